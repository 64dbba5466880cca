# Airflow with the bundle installed, for docker-compose.yaml: every component imports it, also those that never
# see the Dag folder (API server, triggerer).
FROM apache/airflow:3.3.2-python3.12

COPY --chown=airflow:0 requirements.txt /opt/dlq-runbook/
# Naming Airflow keeps pip from moving it within the range.
RUN pip install --no-cache-dir "apache-airflow==${AIRFLOW_VERSION}" -r /opt/dlq-runbook/requirements.txt

COPY --chown=airflow:0 pyproject.toml LICENSE README.md /opt/dlq-runbook/
COPY --chown=airflow:0 include/ /opt/dlq-runbook/include/
COPY --chown=airflow:0 plugins/ /opt/dlq-runbook/plugins/
RUN pip install --no-cache-dir --no-deps /opt/dlq-runbook

# A new volume takes over who owns the folder it is mounted on.
RUN mkdir /opt/airflow/orchestrator
