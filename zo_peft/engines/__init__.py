"""Inference engines that answer for a base, so that whatever serves a LoRA can train one."""
