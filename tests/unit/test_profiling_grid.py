from __future__ import annotations

from statistics import correlation

from lemix_stage_worker.profiling.grid import Cell, grid


def test_tokens_and_contexts_are_counted_as_costs_are() -> None:
    """Of whole sequences length times length; of decodes a token a row, and what each attends to."""
    assert (Cell("prompt", (3, 4)).tokens, Cell("prompt", (3, 4)).contexts) == (7, 25)
    assert (Cell("decode", (30, 40)).tokens, Cell("decode", (30, 40)).contexts) == (2, 70)


def test_cells_fit_the_model_and_the_cache() -> None:
    """No sequence is longer than the context, no pass reads more than the cache holds."""
    cells = grid(context_length=100, cache_tokens=512)
    assert {cell.kind for cell in cells} == {"prompt", "score", "train", "decode"}
    assert max(max(cell.lengths) for cell in cells) <= 100
    assert max(sum(cell.lengths) for cell in cells) <= 512


def test_what_a_token_and_what_a_context_costs_can_be_told_apart() -> None:
    """There are passes of equal tokens and unequal contexts; rows of decodes say little about their contexts."""
    for quick in (False, True):
        cells = grid(context_length=2048, cache_tokens=8192, quick=quick)
        for kind in ("prompt", "score", "train"):
            of_kind = [(cell.tokens, cell.contexts) for cell in cells if cell.kind == kind]
            assert len(of_kind) > len({tokens for tokens, _ in of_kind}), kind
        decodes = [cell for cell in cells if cell.kind == "decode"]
        assert abs(correlation([c.tokens for c in decodes], [c.contexts for c in decodes])) < 0.6


def test_cells_are_always_the_same() -> None:
    """So that two profiles are of the same passes."""
    assert grid(context_length=512, cache_tokens=4096) == grid(context_length=512, cache_tokens=4096)


def test_a_quick_grid_is_smaller() -> None:
    """Of every kind there are fewer cells, and none is as long as the longest of the whole grid."""
    whole, quick = (grid(context_length=2048, cache_tokens=n, quick=n < 8192) for n in (8192, 2048))
    for kind in ("prompt", "score", "train", "decode"):
        tokens, fewer = ([cell.tokens for cell in cells if cell.kind == kind] for cells in (whole, quick))
        assert len(fewer) < len(tokens)
        assert max(fewer) <= max(tokens) // 4
