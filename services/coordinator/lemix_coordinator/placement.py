"""Which worker hosts which stage: living hosts keep theirs, empty positions are filled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from lemix_coordinator.commands import ForgetWorker, PlaceNode
from lemix_coordinator.view import ClusterView

Position = tuple[int, int]
"""(node, stage)."""


def place(view: ClusterView) -> Iterator[ForgetWorker | PlaceNode]:
    """Empty the positions of dead workers, fill empty ones, renew nodes whose links broke.

    A cluster without any host waits for all its workers, ``takeover_after_s`` at most, and spreads the stages over
    those that are there. Later an empty position goes to a worker with room, and waits as long for one.
    """
    alive = sorted(worker.worker for worker in view.workers if not worker.is_dead)
    living = {
        (node.node, index): stage.worker if stage.worker in alive else ""
        for node in view.nodes
        for index, stage in enumerate(node.stages)
    }
    hosts = _fill(view, living, alive) if any(living.values()) else _form(view, living, alive)
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


def _form(view: ClusterView, living: Mapping[Position, str], alive: list[str]) -> Mapping[Position, str]:
    """Evenly over the workers that are there; more than the settings ask for stand by.

    Neighbours are together, but with an interleaved schedule a node's stages go round its workers.
    """
    waited_s = max(view.empty_for_s.values(), default=0.0)
    if not alive or (len(alive) < view.settings.num_workers and waited_s < view.settings.takeover_after_s):
        return living
    settings, hosts = view.settings, alive[: view.settings.num_workers]
    each = settings.num_workers // settings.nodes
    if settings.schedule == "interleaved" and len(hosts) == settings.num_workers:
        return {(node, stage): hosts[node * each + stage % each] for node, stage in living}
    return {position: hosts[i * len(hosts) // len(living)] for i, position in enumerate(sorted(living))}


def _fill(view: ClusterView, living: Mapping[Position, str], alive: list[str]) -> Mapping[Position, str]:
    """Each empty position to a worker with room, after a while to the living one with the fewest stages.

    There is room for nodes x stages / workers (rounded up) stages; an idle worker takes as many as any other has, since
    it stands in for one that had them.
    """
    hosts = dict(living)
    load = Counter(dict.fromkeys(alive, 0))
    load.update(worker for worker in hosts.values() if worker)
    share = -(-len(hosts) // view.settings.num_workers)
    room = {worker: share if load[worker] else max(share, *load.values()) for worker in alive}
    for position in sorted(position for position, worker in hosts.items() if not worker):
        with_room = [worker for worker in alive if load[worker] < room[worker]]
        if with_room:
            # neighbours share a worker where one hosts several stages
            chosen = next((worker for worker in with_room if load[worker]), with_room[0])
        elif view.empty_for_s.get(position, 0.0) >= view.settings.takeover_after_s:
            chosen = min(alive, key=lambda worker: (load[worker], worker))
        else:
            continue
        hosts[position] = chosen
        load[chosen] += 1
    return hosts


def _reason(before: tuple[str, ...], after: tuple[str, ...]) -> str:
    lost = [host for host, now in zip(before, after, strict=True) if host and host != now]
    return f"lost {', '.join(lost)}" if lost else "stages found a host"
