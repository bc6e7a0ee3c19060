"""Configs: TOML in, validated models out, every problem reported with its file and line."""
