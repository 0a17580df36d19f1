"""The flows, which put the stages together. Importing this package sets where Prefect and MLflow keep their data."""

from flows._beginning import begin

begin()
