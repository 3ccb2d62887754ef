"""What happens around the steps: each hook has ``before_run``, ``after_step``, ``after_run``."""
