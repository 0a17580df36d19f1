"""The stories: what the stages are put together for. Importing this settles where Prefect and MLflow keep things."""

from flows._environment import settle_environment

settle_environment()
