"""Running a batch of workflows: steps in order, tries with backoff, many workflows at once."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import msgspec
import structlog

from dlq_orchestrator import telemetry
from dlq_orchestrator.core.backoff import Backoff, RetryBudget
from dlq_orchestrator.core.calls import PluginCalls
from dlq_orchestrator.core.workflow_safety import Memory, WorkflowSafety
from dlq_orchestrator.failures import DataCorruption, Failure, StepError
from dlq_orchestrator.workflow import Record, Run, Step, StepRun, Workflow, parse_workflow

_log = structlog.get_logger()

_STACK_MAX = 8000


@dataclass(frozen=True, slots=True)
class _Job:
    """A record on its way: the workflow in it, or why there is none."""

    record: Record
    workflow: Workflow | DataCorruption
    correlation_id: str
    dedupe_key: str


class Runner:
    """Runs records to their end, whatever they hold; nothing is recorded here.

    :param random: the source of the jitter.
    :param budget: how many retries there may be, over all workflows.
    :param now: the clock, epoch seconds.
    """

    def __init__(
        self,
        calls: PluginCalls,
        safety: WorkflowSafety,
        backoff: Backoff,
        random: Random,
        budget: RetryBudget,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._calls = calls
        self._safety = safety
        self._backoff = backoff
        self._random = random
        self._budget = budget
        self._now = now

    async def run(self, records: Sequence[Record]) -> list[Run]:
        """Run a batch; the result is in the batch's order.

        Workflows wait beside each other. Those that share a dedupe key run one after the other, so that the
        second sees what the first did.
        """
        jobs = [self._job(record) for record in records]
        memory = self._safety.recall({j.correlation_id for j in jobs}, {j.dedupe_key for j in jobs})
        by_key: dict[str, list[tuple[int, _Job]]] = {}
        for place, job in enumerate(jobs):
            by_key.setdefault(job.dedupe_key, []).append((place, job))
        runs: dict[int, Run] = {}

        async def one_after_the_other(jobs_of_key: list[tuple[int, _Job]]) -> None:
            for place, job in jobs_of_key:
                runs[place] = await self._run_job(job, memory)
                memory.learn(runs[place])

        async with asyncio.TaskGroup() as group:
            for jobs_of_key in by_key.values():
                group.create_task(one_after_the_other(jobs_of_key))
        return [runs[place] for place in range(len(jobs))]

    def _job(self, record: Record) -> _Job:
        workflow: Workflow | DataCorruption
        try:
            if record.headers_broken:
                raise DataCorruption("the record's headers cannot be read")
            workflow = parse_workflow(record.value)
            correlation_id = workflow.correlation_id
        except DataCorruption as error:
            workflow = error
            correlation_id = record.text("correlation-id") or record.place
        return _Job(record, workflow, correlation_id, record.text("dedupe-key") or correlation_id)

    async def _run_job(self, job: _Job, memory: Memory) -> Run:
        name = job.workflow.workflow if isinstance(job.workflow, Workflow) else None
        with telemetry.workflow_span(job.record, name, job.correlation_id, job.dedupe_key) as span:
            run = await self._steps_of(job, memory)
            telemetry.ended(span, run)
            if run.failure is not None:
                _log.info(
                    "workflow failed",
                    correlation_id=run.correlation_id,
                    workflow=run.workflow,
                    stage=run.failure.stage,
                    component=run.failure.component,
                    error_type=run.failure.error_type,
                    attempts=run.failure.attempts,
                )
            return replace(run, traceparent=telemetry.traceparent(span))

    async def _steps_of(self, job: _Job, memory: Memory) -> Run:
        if isinstance(job.workflow, DataCorruption):
            return self._ended(job, [], self._failure(job.workflow, "orchestrator.decode", "decode", 1))
        done_by = memory.succeeded.get(job.dedupe_key)
        if done_by is not None:
            return self._ended(job, [], None, done_by)
        completed = memory.completed.get(job.correlation_id, {})
        inputs = memory.inputs.get(job.correlation_id, {})
        steps: list[StepRun] = []
        for position, step in enumerate(job.workflow.steps):
            if step.name in completed:
                continue
            if (args := inputs.get(step.name)) is not None:
                step = msgspec.structs.replace(step, args=args)
            with telemetry.step_span(step, job.correlation_id) as span:
                run, failure = await self._run_step(step, position, job, job.workflow.tenant)
                if failure is not None:
                    telemetry.failed(span, failure.error_type, failure.message)
            steps.append(run)
            if failure is not None:
                return self._ended(job, steps, failure)
        return self._ended(job, steps, None)

    async def _run_step(
        self, step: Step, position: int, job: _Job, tenant: str | None
    ) -> tuple[StepRun, Failure | None]:
        effect_key = f"{job.dedupe_key}/{step.name}"
        before = job.record.retry_count * self._backoff.max_tries
        tries = 0
        while True:
            tries += 1
            try:
                with telemetry.tool_call(step, job.correlation_id, tries):
                    output = await self._calls.call(step, effect_key, before + tries, tenant)
            except StepError as error:
                if (wait_s := self._wait_s(error, tries)) is not None:
                    await asyncio.sleep(wait_s)
                    continue
                run = StepRun(step.name, step.plugin, step.tool, position, "failed", tries, step.args)
                return run, self._failure(error, step.component, step.name, tries)
            self._budget.earn()
            effect = effect_key if self._calls.has_effect(step) else None
            run = StepRun(
                step.name, step.plugin, step.tool, position, "succeeded", tries, step.args, output, effect
            )
            return run, None

    def _wait_s(self, error: StepError, tries: int) -> float | None:
        """Seconds until the next try; None: there is none."""
        if not error.transient:
            return None
        wait_s = self._backoff.wait_s(tries, self._random, error.retry_after_s)
        return wait_s if wait_s is not None and self._budget.take() else None

    def _failure(self, error: StepError, component: str, stage: str, attempts: int) -> Failure:
        trace = "".join(traceback.format_exception(error))[-_STACK_MAX:]
        return Failure(
            error.error_type, str(error), component, stage, attempts, int(self._now() * 1000), trace
        )

    @staticmethod
    def _ended(
        job: _Job, steps: list[StepRun], failure: Failure | None, duplicate_of: str | None = None
    ) -> Run:
        return Run(
            record=job.record,
            correlation_id=job.correlation_id,
            workflow=job.workflow.workflow if isinstance(job.workflow, Workflow) else None,
            dedupe_key=job.dedupe_key,
            state="failed" if failure else "succeeded",
            duplicate_of=duplicate_of,
            failure=failure,
            steps=steps,
        )
