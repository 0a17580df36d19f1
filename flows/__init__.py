"""The flows, which put the stages together. Importing this package settles where Prefect and MLflow keep things."""

from flows._environment import settle_environment

settle_environment()
