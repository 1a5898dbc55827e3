"""See what happens with nothing but redis-cli: state is in readable hashes and streams."""

from __future__ import annotations

from typing import Any

from lemix import GenerateItem, TrainItem
from tutorial.conftest import StartCluster


def test_everything_can_be_read_in_redis(start_cluster: StartCluster) -> None:
    """Who hosts what, what an item's state is, which version serves, how many items there were."""
    cluster, client = start_cluster(stages=2, step_examples=2)
    redis: Any = cluster.broker.client
    prefix = f"{{{cluster.broker.keys.cluster}}}:"  # `{lemix}:` unless --cluster says otherwise

    node = redis.hgetall(prefix + "node:0")
    assert node["stage:0"].startswith("worker-")
    assert redis.exists(prefix + f"worker:{node['stage:0']}:alive")

    client.submit(GenerateItem("the cat", max_new_tokens=4, ignore_eos=True, item_id="mine")).result(
        timeout=20
    )
    item = redis.hgetall(prefix + "item:mine")
    assert (item["state"], item["kind"], item["weights_version"]) == ("done", "generate", "0.0")
    assert len(redis.lrange(prefix + "item:mine:tokens", 0, -1)) == 4

    for future in [client.submit(TrainItem("the cat", "sat")) for _ in range(2)]:
        future.result(timeout=20)
    assert redis.hget(prefix + "run:main", "committed") == "1"
    assert redis.hget(prefix + "versions", "served") == "0.1"
    assert float(redis.hget(prefix + "run:main:step:1", "loss")) > 0
    assert redis.hget(prefix + "totals", "done") == "3"
    assert redis.xlen(prefix + "submissions") == 0
