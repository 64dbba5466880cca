"""What runs inside Airflow: operators, a sensor, a trigger and the reports' app, thin over :mod:`dlq`."""

from __future__ import annotations
