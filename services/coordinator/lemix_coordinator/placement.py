"""Which worker hosts which stage: living hosts keep theirs, empty positions are filled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from lemix_coordinator.commands import ForgetWorker, PlaceNode
from lemix_coordinator.view import ClusterView


def place(view: ClusterView) -> Iterator[ForgetWorker | PlaceNode]:
    """Empty the positions of dead workers, fill empty ones, renew nodes whose links broke.

    A position goes to a worker with room (nodes x stages / workers, rounded up, each). Where none has, it waits
    ``takeover_after_s`` for a fresh process; then the living worker with the fewest stages takes it too.
    """
    alive = {worker.worker for worker in view.workers if not worker.is_dead}
    hosts = {
        (node.node, index): stage.worker if stage.worker in alive else ""
        for node in view.nodes
        for index, stage in enumerate(node.stages)
    }
    load = Counter(dict.fromkeys(sorted(alive), 0))
    load.update(worker for worker in hosts.values() if worker)
    patience_s = view.settings.takeover_after_s
    # a cluster that starts waits for all its workers before it spreads the stages
    is_forming = (
        not any(hosts.values())
        and len(alive) < view.settings.num_workers
        and max(view.empty_for_s.values(), default=0.0) < patience_s
    )
    room = -(-len(hosts) // view.settings.num_workers)
    for position in sorted(hosts):
        if hosts[position] or is_forming or not alive:
            continue
        with_room = [worker for worker in load if load[worker] < room]
        if with_room:
            # neighbours share a worker where one hosts several stages
            chosen = max(with_room, key=lambda worker: (load[worker] > 0, -_order(worker, load)))
        elif view.empty_for_s.get(position, 0.0) >= patience_s:
            chosen = min(load, key=lambda worker: (load[worker], worker))
        else:
            continue
        hosts[position] = chosen
        load[chosen] += 1
    for node in view.nodes:
        before = tuple(stage.worker for stage in node.stages)
        after = tuple(hosts[node.node, index] for index in range(len(node.stages)))
        if before != after:
            yield PlaceNode(node.node, after, _reason(before, after))
        elif node.is_link_lost and all(after):
            yield PlaceNode(node.node, after, "a link between its stages broke")
    for worker in view.workers:
        if worker.is_dead:
            yield ForgetWorker(worker.worker)


def _order(worker: str, load: Counter[str]) -> int:
    return sorted(load).index(worker)


def _reason(before: tuple[str, ...], after: tuple[str, ...]) -> str:
    lost = [host for host, now in zip(before, after, strict=True) if host and host != now]
    return f"lost {', '.join(lost)}" if lost else "stages found a host"
