"""Grids of cases of which a part is run always, and the rest with ``-m sweep``."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator
from typing import Any

import pytest

__all__ = ["sampled", "thin_out", "thinned"]

SHARES = {
    "test_adapters.py::test_gradients_and_scores_are_those_of_the_model": 3,
    "test_alike.py::test_layers_that_differ": 2,
    "test_attention.py::test_every_position_needs_no_mask": 3,
    "test_bad_input.py::test_an_empty_batch": 2,
    "test_bad_input.py::test_weights_that_are_not_finite": 2,
    "test_compile.py::test_a_copy_is_an_ordinary_model_of_its_own": 3,
    "test_compile.py::test_frozen_parts": 4,
    "test_compile.py::test_token_shaped_outputs": 3,
    "test_estimate.py::test_attention_on_chunks_of_queries": 3,
    "test_estimate.py::test_the_peak_is_that_of_a_real_step": 4,
    "test_exact.py::test_backends_agree": 2,
    "test_exact.py::test_bfloat16": 2,
    "test_exact.py::test_bfloat16_autocast_reaches_every_weight": 4,
    "test_exact.py::test_float32": 2,
    "test_exact.py::test_frozen_parts": 4,
    "test_exact.py::test_keeping_everything_is_ordinary_fine_tuning": 3,
    "test_exact.py::test_keeping_everything_of_transformers_models": 2,
    "test_exact.py::test_kinds_of_model": 3,
    "test_exact.py::test_other_ways_to_pair_logits_with_labels": 2,
    "test_exact.py::test_rows_and_batches_without_labels": 4,
    "test_exact.py::test_scores_and_selections": 2,
    "test_exact.py::test_scores_of_transformers_models": 4,
    "test_exact.py::test_sizes_that_are_equal_are_not_confused": 3,
    "test_exact.py::test_transformers_models": 3,
    "test_examples.py::test_the_peak_is_seen_after_the_memory_is_given_back": 3,
    "test_experts.py::test_entries_in_the_order_of_their_experts": 2,
    "test_failures.py::test_a_loss_that_is_none": 4,
    "test_failures.py::test_a_loss_that_raises": 5,
    "test_failures.py::test_a_vision_tower_outside_of_the_graph": 2,
    "test_families.py::test_exact": 8,
    "test_families.py::test_mixers_of_other_kinds_take_the_general_path": 2,
    "test_families.py::test_refused": 2,
    "test_families.py::test_the_pooled_token_is_always_kept": 5,
    "test_general.py::test_body": 3,
    "test_hooks.py::test_a_hook_on_a_backward_is_an_error": 4,
    "test_hooks.py::test_a_hook_that_is_added_and_removed_later": 3,
    "test_inputs.py::test_every_mask_tells_padding": 2,
    "test_inputs.py::test_packed_rows_are_those_of_ordinary_training": 4,
    "test_inputs.py::test_positions_of_three_kinds": 2,
    "test_latents.py::test_gradients_are_those_of_expanded_keys_and_values": 2,
    "test_latents.py::test_saved_bytes_do_not_grow_with_the_heads": 2,
    "test_lengths.py::test_steps_are_exact": 3,
    "test_loops.py::test_a_resumed_run_is_the_uninterrupted_one": 3,
    "test_loops.py::test_sft": 3,
    "test_losses.py::test_all_tokens_are_ordinary_training": 4,
    "test_losses.py::test_over_selected_tokens": 4,
    "test_losses.py::test_probabilities": 3,
    "test_losses.py::test_scores_by_the_loss_that_is_minimised": 3,
    "test_mass.py::test_a_row_alone_keeps_what_it_keeps_in_a_batch": 3,
    "test_mass.py::test_built_in_scores_keep_the_shortest_that_hold_the_share": 3,
    "test_parts.py::test_families": 3,
    "test_parts.py::test_little_is_trained": 3,
    "test_parts.py::test_ratio_1_is_ordinary_training": 3,
    "test_parts.py::test_the_gradients_are_those_of_one_part": 4,
    "test_parts.py::test_with_other_settings": 3,
    "test_profile.py::test_the_peak_is_the_profilers": 3,
    "test_programs.py::test_each_operation": 3,
    "test_programs.py::test_each_operation_on_frozen_weights": 3,
    "test_quantised.py::test_lowered": 3,
    "test_quantised.py::test_qlora": 3,
    "test_ratios.py::test_the_labelled_positions_and_no_others": 3,
    "test_recompute.py::test_exact": 3,
    "test_recompute.py::test_exact_lora": 3,
    "test_recompute.py::test_learn_on_chunks_of_queries": 3,
    "test_recompute.py::test_recomputation_repeats_the_forward": 3,
    "test_recompute.py::test_scores_on_chunks_of_tokens": 3,
    "test_recorded.py::test_recorded_values_are_those_of_the_model": 3,
    "test_regressions.py::test_places_that_the_model_reads_are_kept": 3,
    "test_rules.py::test_calls_that_are_easily_misread_are_exact": 3,
    "test_rules.py::test_every_spelling_has_the_same_plan": 3,
    "test_selecting.py::test_the_weighted_loss_is_unbiased": 3,
    "test_selective.py::test_a_checkpoint_around_the_model": 3,
    "test_selective.py::test_families": 3,
    "test_selective.py::test_gradients_are_the_same_to_the_bit": 3,
    "test_selective.py::test_it_keeps_less": 3,
    "test_spans.py::test_gradients_are_exact": 4,
    "test_spans.py::test_the_weighted_loss_of_spans_is_unbiased": 4,
    "test_stages.py::test_nothing_of_a_step_waits_for_the_garbage_collector": 3,
    "test_stages.py::test_scores_are_those_of_the_paper": 3,
    "test_stages.py::test_scoring_never_makes_a_map_or_all_logits": 3,
    "test_trl.py::test_gradients_are_those_of_masked_backprop": 3,
    "test_tuners.py::test_a_draw_is_settled_where_no_draw_could_say_otherwise": 3,
    "test_tuners.py::test_a_layer_that_is_dropped_by_chance_is_refused_with_the_remedy": 2,
    "test_tuners.py::test_gradients_are_those_of_masked_full_backprop": 4,
    "test_unbatch.py::test_token_types": 3,
    "test_writes.py::test_buffers_are_written_once_a_step": 3,
    "test_writes.py::test_writes_that_become_new_values": 3,
}
"""Of these tests' cases every n-th is run always, and the rest with ``-m sweep``."""

LONG = {
    "test_bad_input.py": ["test_adapters_added_and_switched_after_compile", "test_one_token"],
    "test_budget.py": ["test_a_step_learns_the_same", "test_out_of_reach"],
    "test_compare_memory.py": ["test_it_prints_a_table_and_plots"],
    "test_compile.py": [
        "test_explain_of_a_second_model",
        "test_saved_bytes_grow_with_what_is_kept_and_are_predicted",
    ],
    "test_estimate.py": [
        "test_a_million_tokens_are_quick",
        "test_a_shard_of_a_model",
        "test_an_optimiser_of_ones_own",
        "test_qlora_stores_what_bitsandbytes_stores",
    ],
    "test_exact.py": ["test_random_models_with_any_score"],
    "test_experts.py": ["test_adapters_on_experts", "test_saved_bytes_follow_the_ratio"],
    "test_families.py": [
        "test_a_decoder_of_the_length_of_its_encoder",
        "test_published_shapes_go_through_all_passes",
    ],
    "test_inputs.py": [
        "test_lengths_that_are_equal_by_chance_without_assertions",
        "test_masks_in_a_dictionary",
    ],
    "test_loops.py": ["test_an_adapter_is_saved_reloaded_and_merged"],
    "test_page.py": ["test_virtual_tokens_and_embeddings"],
    "test_profile.py": ["test_errors", "test_fewer_tokens_save_less", "test_it_prints_and_plots"],
    "test_quality.py": ["test_all_is_put_back"],
    "test_quantised.py": [
        "test_a_dequantised_weight_is_not_kept_for_backward",
        "test_qlora_lowered",
    ],
    "test_recorded.py": [
        "test_a_model_that_asks_for_itself",
        "test_router_losses_in_the_first_call",
    ],
    "test_trl.py": ["test_values_are_those_of_all_tokens"],
}
"""Tests that take long, and of which others say something too: the sweep runs them."""


def thin_out(items: Iterable[pytest.Item]) -> None:
    """Mark for the sweep what is `LONG`, and what `SHARES` leaves out.

    That is another case along each axis of a grid.
    """
    for item in items:
        file, name = item.path.name, getattr(item, "originalname", "")
        share = SHARES.get(f"{file}::{name}")
        if name in LONG.get(file, ()) or (share is not None and sum(_places(item)) % share):
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
