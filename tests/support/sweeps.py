"""Grids of cases of which a part is run always, and the rest with ``-m sweep``."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from typing import Any

import pytest

__all__ = ["sampled", "thin_out", "thinned"]

SHARES: dict[str, dict[str, int | None]] = {
    "test_adapters.py": {
        "test_gradients_and_scores_are_those_of_the_model": 6,
        "test_other_kinds_of_lora_stay_apart": None,
    },
    "test_alike.py": {
        "test_families": None,
        "test_layers_that_differ": 4,
    },
    "test_attention.py": {
        "test_every_position_needs_no_mask": 6,
    },
    "test_bad_input.py": {
        "test_adapters_added_and_switched_after_compile": None,
        "test_an_empty_batch": 2,
        "test_many_models_in_one_process": None,
        "test_one_token": None,
        "test_weights_that_are_not_finite": 2,
    },
    "test_boxed.py": {
        "test_an_error_of_a_stage_names_the_line_of_the_model": 3,
    },
    "test_budget.py": {
        "test_a_step_learns_the_same": None,
        "test_out_of_reach": None,
    },
    "test_compile.py": {
        "test_a_copy_is_an_ordinary_model_of_its_own": 3,
        "test_explain_of_a_second_model": None,
        "test_frozen_parts": 4,
        "test_saved_bytes_grow_with_what_is_kept_and_are_predicted": None,
        "test_token_shaped_outputs": 3,
    },
    "test_coverage.py": {
        "test_a_part_of_it_made_again": None,
        "test_tuners_on_quantised_weights": None,
    },
    "test_estimate.py": {
        "test_a_million_tokens_are_quick": None,
        "test_a_module_is_left_as_it_is": None,
        "test_a_shard_of_a_model": None,
        "test_an_optimiser_of_ones_own": None,
        "test_attention_on_chunks_of_queries": 3,
        "test_qlora_stores_what_bitsandbytes_stores": None,
        "test_the_bytes_of_a_large_model": None,
        "test_the_peak_is_that_of_a_real_step": 8,
    },
    "test_exact.py": {
        "test_backends_agree": 2,
        "test_bfloat16": 2,
        "test_bfloat16_autocast_reaches_every_weight": 4,
        "test_float32": 3,
        "test_frozen_parts": 4,
        "test_keeping_everything_is_ordinary_fine_tuning": 3,
        "test_keeping_everything_of_transformers_models": 4,
        "test_kinds_of_model": 6,
        "test_logits": 2,
        "test_other_ways_to_pair_logits_with_labels": 4,
        "test_parameters_frozen_after_the_first_step": None,
        "test_random_models_with_any_score": None,
        "test_rows_and_batches_without_labels": 8,
        "test_scores_and_selections": 4,
        "test_scores_of_transformers_models": 8,
        "test_sizes_that_are_equal_are_not_confused": 3,
        "test_trainer_arguments_of_transformers_models": 2,
        "test_transformers_models": 8,
    },
    "test_examples.py": {
        "test_the_benchmark_writes_its_tables_between_its_markers": None,
        "test_the_peak_is_seen_after_the_memory_is_given_back": 3,
    },
    "test_experts.py": {
        "test_adapters_on_experts": None,
        "test_entries_in_the_order_of_their_experts": 2,
        "test_saved_bytes_follow_the_ratio": None,
    },
    "test_failures.py": {
        "test_a_loss_that_is_none": 4,
        "test_a_loss_that_raises": 5,
        "test_a_vision_tower_outside_of_the_graph": 2,
    },
    "test_families.py": {
        "test_a_decoder_of_the_length_of_its_encoder": None,
        "test_exact": 15,
        "test_mixers_of_other_kinds_take_the_general_path": 4,
        "test_published_shapes_go_through_all_passes": None,
        "test_refused": 2,
        "test_the_pooled_token_is_always_kept": 5,
    },
    "test_general.py": {
        "test_body": 3,
    },
    "test_hooks.py": {
        "test_a_hook_in_the_place_of_another": None,
        "test_a_hook_on_a_backward_is_an_error": 4,
        "test_a_hook_that_is_added_and_removed_later": None,
        "test_an_activation_that_is_computed": 2,
    },
    "test_inputs.py": {
        "test_every_mask_tells_padding": 2,
        "test_lengths_that_are_equal_by_chance_without_assertions": None,
        "test_masks_in_a_dictionary": None,
        "test_packed_rows_are_those_of_ordinary_training": 8,
        "test_positions_of_three_kinds": 2,
    },
    "test_latents.py": {
        "test_gradients_are_those_of_expanded_keys_and_values": 2,
        "test_saved_bytes_do_not_grow_with_the_heads": 2,
    },
    "test_lengths.py": {
        "test_steps_are_exact": 3,
    },
    "test_loops.py": {
        "test_a_resumed_run_is_the_uninterrupted_one": 3,
        "test_an_adapter_is_saved_reloaded_and_merged": None,
        "test_resuming_from_a_checkpoint_without_the_callback": None,
        "test_sft": 3,
        "test_torch_compile_around_the_model_leaves_the_step_alone": None,
        "test_unused_columns_are_removed": None,
    },
    "test_losses.py": {
        "test_all_tokens_are_ordinary_training": 8,
        "test_over_selected_tokens": 16,
        "test_probabilities": 6,
        "test_scores_by_the_loss_that_is_minimised": 3,
        "test_what_is_not_restricted_is_said": 2,
    },
    "test_mass.py": {
        "test_a_row_alone_keeps_what_it_keeps_in_a_batch": None,
        "test_built_in_scores_keep_the_shortest_that_hold_the_share": 6,
        "test_equal_bounds_are_a_fixed_ratio": None,
        "test_kinds_of_attention": 2,
        "test_numbers_that_change_from_step_to_step_with_a_lowered_stage": None,
        "test_random_models": None,
        "test_rows_keep_what_holds_the_share": 2,
        "test_the_expected_loss_of_samples_is_that_of_all_tokens": None,
    },
    "test_page.py": {
        "test_virtual_tokens_and_embeddings": None,
    },
    "test_parts.py": {
        "test_a_gradient_of_the_gradient_is_an_error": None,
        "test_a_mask_that_shows_later_tokens": None,
        "test_an_encoder_is_learned_in_one_part": None,
        "test_an_estimate_knows_the_precision_of_gradients_that_wait": None,
        "test_an_estimate_with_dropout": None,
        "test_autocast": 2,
        "test_compiled_stages_are_learned_in_one_part": None,
        "test_estimate_and_profile_know_parts": None,
        "test_families": 3,
        "test_gradients_are_added_to_those_that_are_there": None,
        "test_gradients_of_some_parameters": None,
        "test_inputs_that_are_trained": None,
        "test_keys_without_gradient": 2,
        "test_little_is_trained": None,
        "test_one_part_draws_as_ever": None,
        "test_outputs_with_gradient_beside_the_loss": None,
        "test_ratio_1_is_ordinary_training": 3,
        "test_the_gradients_are_those_of_one_part": 8,
        "test_the_precision_of_gradients_that_wait": 2,
        "test_two_steps_at_once": None,
        "test_with_other_settings": 6,
    },
    "test_profile.py": {
        "test_categories_and_stages": None,
        "test_errors": None,
        "test_fewer_tokens_save_less": None,
        "test_it_prints_and_plots": None,
        "test_saved_bytes_are_the_reports": None,
        "test_the_peak_is_the_profilers": 6,
    },
    "test_programs.py": {
        "test_each_operation": 3,
        "test_each_operation_on_frozen_weights": 10,
    },
    "test_quality.py": {
        "test_a_loss_of_ones_own": None,
        "test_all_is_put_back": None,
        "test_bias_and_noise_are_told_apart": None,
    },
    "test_quantised.py": {
        "test_a_dequantised_weight_is_not_kept_for_backward": None,
        "test_biases": 2,
        "test_lowered": 3,
        "test_qlora": 3,
        "test_qlora_lowered": None,
    },
    "test_ratios.py": {
        "test_a_function_that_returns_no_share": 3,
        "test_explain_counts_the_labels_of_the_batch": None,
        "test_the_labelled_positions_and_no_others": 9,
        "test_the_largest_is_what_is_estimated": None,
    },
    "test_recompute.py": {
        "test_a_mask_that_is_read_as_it_is_too": 2,
        "test_a_mean_over_tokens_after_the_last_attention": 2,
        "test_chunks_bound_the_memory_of_scoring": None,
        "test_exact": 6,
        "test_exact_families": 2,
        "test_exact_lora": 3,
        "test_learn_on_chunks_of_queries": 5,
        "test_masks_made_of_the_stream": 2,
        "test_recomputation_repeats_the_forward": None,
        "test_scores_on_chunks_of_tokens": 5,
        "test_scoring_in_chunks_makes_dropout_the_same_in_backward": None,
        "test_weights_that_are_computed_in_the_head": 2,
        "test_what_the_model_keeps_from_a_gradient_gets_none": 2,
    },
    "test_recorded.py": {
        "test_a_model_that_asks_for_itself": None,
        "test_explaining_a_first_call": None,
        "test_recorded_values_are_those_of_the_model": 3,
        "test_router_losses_in_the_first_call": None,
    },
    "test_regressions.py": {
        "test_places_that_the_model_reads_are_kept": 3,
    },
    "test_rules.py": {
        "test_calls_that_are_easily_misread_are_exact": 3,
        "test_calls_that_mix_tokens_have_no_plan": 3,
        "test_every_spelling_has_the_same_plan": 3,
        "test_law": 3,
    },
    "test_scoring.py": {},
    "test_selecting.py": {
        "test_the_weighted_loss_is_unbiased": 3,
    },
    "test_selective.py": {
        "test_a_checkpoint_around_the_model": 6,
        "test_a_checkpoint_around_the_model_would_draw_others": 4,
        "test_a_region_is_made_once_and_let_go": None,
        "test_another_layout_is_an_error": None,
        "test_backward_twice_makes_it_twice": None,
        "test_families": 6,
        "test_gradients_are_the_same_to_the_bit": 3,
        "test_it_keeps_less": 6,
        "test_regions_end_at_the_next_attention": 2,
        "test_saving_on_the_host": 2,
        "test_weights_of_a_norm_changed_before_backward_are_an_error": None,
    },
    "test_sinks.py": {
        "test_first_tokens_are_kept_and_gradients_exact": 4,
        "test_more_sinks_than_tokens": None,
        "test_sinks_change_nothing_where_all_are_kept_and_are_told": None,
    },
    "test_spans.py": {
        "test_adapters_and_draws_of_a_step": None,
        "test_gradients_are_exact": 8,
        "test_the_weighted_loss_of_spans_is_unbiased": None,
    },
    "test_stages.py": {
        "test_nothing_of_a_step_waits_for_the_garbage_collector": 3,
        "test_scores_are_those_of_the_paper": 3,
        "test_scoring_never_makes_a_map_or_all_logits": 3,
        "test_the_prefill_makes_no_logits": 2,
        "test_the_weighted_loss_is_the_full_loss_on_average": 2,
    },
    "test_trl.py": {
        "test_calls_without_labels_have_values_of_all_tokens_and_a_gradient_check": None,
        "test_estimates_and_budgets_of_a_fused_head": None,
        "test_gradients_are_those_of_masked_backprop": 5,
        "test_log_probs_of_other_tokens_are_refused": None,
        "test_padding_on_the_left_and_float16_weights_of_a_head_in_float32": None,
        "test_ratio_one_is_trl_itself": 2,
        "test_rewards_are_scored_by_their_own_gradient_and_logits_of_classes_are_not": None,
        "test_values_are_those_of_all_tokens": None,
        "test_values_of_a_model_that_draws_are_those_of_its_gradient": None,
    },
    "test_tuners.py": {
        "test_a_draw_is_settled_where_no_draw_could_say_otherwise": 3,
        "test_a_layer_that_is_dropped_by_chance_is_refused_with_the_remedy": 2,
        "test_gradients_are_those_of_masked_full_backprop": 7,
        "test_lora_with_dropout_trains": 2,
    },
    "test_unbatch.py": {
        "test_a_mask_by_numbers": 2,
        "test_token_types": None,
    },
    "test_writes.py": {
        "test_buffers_are_written_once_a_step": 3,
        "test_writes_that_are_followed_through_views": 2,
        "test_writes_that_become_new_values": 3,
    },
}
"""Of these tests' cases every n-th is run always, and the rest with ``-m sweep``.

None leaves all of them to the sweep: they take long, and other tests show a part of the same.
"""


def thin_out(items: Iterable[pytest.Item]) -> None:
    """Mark for the sweep what `SHARES` leaves out: another case along each axis of a grid."""
    numbers: Counter[Any] = Counter()
    for item in items:
        function = getattr(item, "originalname", "")
        share = SHARES.get(item.path.name, {}).get(function, 1)
        number = numbers[item.path, function]
        numbers[item.path, function] += 1
        if share is None or sum(_places(item, number)) % share:
            item.add_marker(pytest.mark.sweep)


def _places(item: pytest.Item, number: int) -> Iterator[int]:
    """Where the case of this number stands along each axis of its grid, the last one first."""
    for axis in reversed(list(item.iter_markers("parametrize"))):
        number, place = divmod(number, len(axis.args[1]))
        yield place


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
