"""Grids of cases of which a part is run always, and the rest with ``-m sweep``."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator
from typing import Any

import pytest

__all__ = ["sampled", "thin_out", "thinned"]

SHARES = {
    "test_adapters.py::test_gradients_and_scores_are_those_of_the_model": 2,
    "test_attention.py::test_every_position_needs_no_mask": 2,
    "test_estimate.py::test_the_peak_is_that_of_a_real_step": 2,
    "test_compile.py::test_frozen_parts": 2,
    "test_exact.py::test_frozen_parts": 2,
    "test_exact.py::test_keeping_everything_is_ordinary_fine_tuning": 2,
    "test_exact.py::test_kinds_of_model": 2,
    "test_exact.py::test_rows_and_batches_without_labels": 2,
    "test_exact.py::test_scores_of_transformers_models": 2,
    "test_exact.py::test_sizes_that_are_equal_are_not_confused": 2,
    "test_exact.py::test_transformers_models": 2,
    "test_examples.py::test_the_peak_is_seen_after_the_memory_is_given_back": 2,
    "test_failures.py::test_a_loss_that_raises": 2,
    "test_families.py::test_exact": 4,
    "test_families.py::test_the_pooled_token_is_always_kept": 2,
    "test_general.py::test_body": 2,
    "test_hooks.py::test_a_hook_on_a_backward_is_an_error": 2,
    "test_hooks.py::test_a_hook_that_is_added_and_removed_later": 2,
    "test_inputs.py::test_packed_rows_are_those_of_ordinary_training": 2,
    "test_lengths.py::test_steps_are_exact": 2,
    "test_loops.py::test_a_resumed_run_is_the_uninterrupted_one": 2,
    "test_loops.py::test_sft": 3,
    "test_losses.py::test_all_tokens_are_ordinary_training": 2,
    "test_losses.py::test_over_selected_tokens": 2,
    "test_losses.py::test_probabilities": 2,
    "test_mass.py::test_a_row_alone_keeps_what_it_keeps_in_a_batch": 3,
    "test_mass.py::test_built_in_scores_keep_the_shortest_that_hold_the_share": 2,
    "test_parts.py::test_families": 2,
    "test_parts.py::test_little_is_trained": 2,
    "test_parts.py::test_ratio_1_is_ordinary_training": 2,
    "test_parts.py::test_the_gradients_are_those_of_one_part": 2,
    "test_parts.py::test_with_other_settings": 2,
    "test_profile.py::test_the_peak_is_the_profilers": 3,
    "test_programs.py::test_each_operation": 2,
    "test_programs.py::test_each_operation_on_frozen_weights": 2,
    "test_quantised.py::test_lowered": 2,
    "test_quantised.py::test_qlora": 2,
    "test_recorded.py::test_recorded_values_are_those_of_the_model": 2,
    "test_recompute.py::test_exact": 2,
    "test_recompute.py::test_exact_lora": 3,
    "test_recompute.py::test_learn_on_chunks_of_queries": 2,
    "test_recompute.py::test_recomputation_repeats_the_forward": 2,
    "test_recompute.py::test_scores_on_chunks_of_tokens": 3,
    "test_regressions.py::test_places_that_the_model_reads_are_kept": 3,
    "test_rules.py::test_calls_that_are_easily_misread_are_exact": 2,
    "test_rules.py::test_every_spelling_has_the_same_plan": 2,
    "test_selecting.py::test_the_weighted_loss_is_unbiased": 2,
    "test_selective.py::test_a_checkpoint_around_the_model": 3,
    "test_selective.py::test_families": 3,
    "test_selective.py::test_gradients_are_the_same_to_the_bit": 2,
    "test_selective.py::test_it_keeps_less": 2,
    "test_spans.py::test_gradients_are_exact": 4,
    "test_spans.py::test_the_weighted_loss_of_spans_is_unbiased": 4,
    "test_ratios.py::test_the_labelled_positions_and_no_others": 3,
    "test_stages.py::test_nothing_of_a_step_waits_for_the_garbage_collector": 2,
    "test_stages.py::test_scores_are_those_of_the_paper": 2,
    "test_stages.py::test_scoring_never_makes_a_map_or_all_logits": 2,
    "test_trl.py::test_gradients_are_those_of_masked_backprop": 2,
    "test_tuners.py::test_gradients_are_those_of_masked_full_backprop": 2,
    "test_unbatch.py::test_token_types": 2,
    "test_writes.py::test_buffers_are_written_once_a_step": 2,
    "test_writes.py::test_writes_that_become_new_values": 2,
}
"""Of these tests' cases every n-th is run always, and the rest with ``-m sweep``."""


def thin_out(items: Iterable[pytest.Item]) -> None:
    """Mark for the sweep what `SHARES` leaves out: along each axis of a grid another case."""
    for item in items:
        share = SHARES.get(f"{item.path.name}::{getattr(item, 'originalname', '')}")
        if share is not None and sum(_places(item)) % share:
            item.add_marker(pytest.mark.sweep)


def _places(item: pytest.Item) -> Iterator[int]:
    """Where a case stands along each axis of its grid."""
    axes: Any = item.iter_markers("parametrize") if hasattr(item, "callspec") else ()
    for axis in axes:
        case: Any = vars(item)["callspec"]
        names = axis.args[0] if axis.args else axis.kwargs["argnames"]
        first = names.split(",")[0].strip() if isinstance(names, str) else names[0]
        yield case.indices[first]


def sampled(cases: Iterable[Any], always: Container[Any]) -> list[Any]:
    """The cases, of which those in `always` are run always."""
    return [
        case if case in always else pytest.param(case, marks=pytest.mark.sweep) for case in cases
    ]


def thinned(*axes: Iterable[Any]) -> list[Any]:
    """All combinations, of which every other one is run always: each value with half of the rest.

    Values name themselves in the ids, by their ``__name__`` or as they print.
    """
    every = [list(axis) for axis in axes]
    cases = []
    for places in itertools.product(*(range(len(axis)) for axis in every)):
        values = [axis[place] for axis, place in zip(every, places, strict=True)]
        name = "-".join(str(getattr(value, "__name__", value)) for value in values)
        marks = pytest.mark.sweep if sum(places) % 2 else ()
        cases.append(pytest.param(*values, id=name, marks=marks))
    return cases
