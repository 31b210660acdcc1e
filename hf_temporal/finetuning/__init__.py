"""What the fine-tuning recipes share: arguments, models, tasks, going on with a run, reports."""

from hf_temporal.installed import require

require("recipes")
