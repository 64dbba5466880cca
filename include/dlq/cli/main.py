"""``dlq``: the core on the command line, for a terminal, for scripts, and for the night when Airflow is what is down.

Results go to standard output (``--json``: one document a line), the rest to standard error.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from dlq import telemetry
from dlq.cli import act, exits, group, ledger, look, repair, terminal
from dlq.cli.exits import OK, WRONG, exit_code
from dlq.errors import DlqError


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Drain dead-letter queues from the command line.\n\n"
    "QUEUE is the name of a file in $DLQ_CONFIG/queues. Connections come from AIRFLOW_CONN_<ID>, as JSON or URI.",
    epilog=exits.IN_WORDS,
)
def commands() -> None:
    pass


for command in (*look.COMMANDS, *act.COMMANDS, repair.repair, group.group, ledger.ledger):
    commands.add_command(command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process: each error is one line, and has its exit status."""
    signal.signal(signal.SIGTERM, _terminated)
    terminal.log_to_terminal()
    try:
        with telemetry.exported(f"dlq {next(iter(sys.argv[1:] if arguments is None else arguments), '')}"):
            code = commands.main(args=arguments, prog_name="dlq", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else OK)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "dlq"
        terminal.complain(f"{error.format_message()} (`{path} --help` says more)")
        sys.exit(WRONG)
    except click.ClickException as error:
        terminal.complain(error.format_message())
        sys.exit(WRONG)
    except (click.Abort, KeyboardInterrupt):
        terminal.complain("interrupted: what was committed stands, the next run goes on from there")
        sys.exit(130)
    except DlqError as error:
        terminal.complain(str(error))
        sys.exit(exit_code(error))
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(OK)


def _terminated(_signal: int, _frame: object) -> NoReturn:
    terminal.complain("terminated: what was committed stands, the next run goes on from there")
    sys.exit(143)
