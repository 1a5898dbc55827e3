"""The set of options is a promise: adding or removing one is a decision, made here and in the changelog."""

from __future__ import annotations

from dataclasses import fields

from lemix.cli.setting_options import setting_descriptions
from lemix_common.settings import ClusterSettings

SETTINGS = """
model nodes stages workers policy prefer slo_s replicas training_share step_examples step_tokens microbatches
microbatch_tokens schedule order min_training_share max_training_tax activation_bytes recompute dtype device
max_step_wait_s learning_rate weight_decay
optimizer learning_rate_schedule warmup_steps schedule_steps max_gradient_norm virtual_shards seed publish_every
gate_file gate_margin on_update max_drain_s max_drain_share checkpoint_every keep_checkpoints
max_queue max_running batching max_batch_tokens max_block_ms batch_wait_ms kv_bytes
max_deliveries result_ttl_s heartbeat_expiry_s client_expiry_s takeover_after_s
""".split()


def test_the_set_of_settings_is_frozen() -> None:
    """No option without an owner: a new one must be added to this list on purpose."""
    assert [field.name for field in fields(ClusterSettings)] == SETTINGS


def test_every_setting_says_what_it_means() -> None:
    """Each setting has one sentence below it, which the command line and docs/configuration.md show."""
    assert list(setting_descriptions()) == SETTINGS
    assert all(text.endswith(".") for text in setting_descriptions().values())
