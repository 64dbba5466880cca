"""What runs inside Airflow: operators, a sensor, a trigger and a page's app, thin over the core (:mod:`dlq`)."""

from __future__ import annotations
