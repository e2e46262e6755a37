"""The command `supercl`: one group, its commands named in a table and imported only when they run.

So `supercl --help` imports nothing but click, and a machine with one half installed has a working command line:
a command of the other half says which extra to install. Errors of a user become one message and an exit code.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from typing import Any, Final, NamedTuple

import click

from supercl_core.errors import SuperCLError, storage_error


class _Entry(NamedTuple):
    module: str
    extra: str
    help: str
    resumes: bool = False
    """Whether the same command goes on where it was stopped."""

    def summary(self) -> str:
        """One line for the list of commands."""
        return f"{self.help} Resumes." if self.resumes else self.help


# In the order in which a user meets them.
COMMANDS: Final = {
    "phantom": _Entry("preprocess.commands", "preprocess", "Write a labelled data set of synthetic anatomy."),
    "preprocess": _Entry(
        "preprocess.commands", "preprocess", "Volumes in, superpixel cache out.", resumes=True
    ),
    "verify": _Entry("supercl_core.commands", "", "Check every checksum and invariant of a cache."),
    "repair": _Entry("preprocess.commands", "preprocess", "Compute damaged cases of a cache again."),
    "weak-labels": _Entry(
        "preprocess.commands", "preprocess", "Compute CCL weak labels of a cache: its positive pairs."
    ),
    "quality": _Entry(
        "preprocess.commands", "preprocess", "Compare a cache's superpixels with scikit-image's."
    ),
    "inspect": _Entry("supercl_core.commands", "", "Show what a cache holds."),
    "view": _Entry("supercl_core.commands", "", "Draw a slice or a whole case of a cache."),
    "pack": _Entry("supercl_core.commands", "", "Write a cache as a compressed archive.", resumes=True),
    "unpack": _Entry("supercl_core.commands", "", "Write the cache that an archive holds.", resumes=True),
    "describe": _Entry("train.commands", "train", "Store descriptors of every slice, from an encoder."),
    "split": _Entry("supercl_core.commands", "", "Write a random split of a cache's labelled cases."),
    "pretrain": _Entry("train.commands", "train", "Pre-train an encoder on a cache.", resumes=True),
    "finetune": _Entry("train.commands", "train", "Fine-tune a segmentation network.", resumes=True),
    "evaluate": _Entry(
        "train.scoring_commands", "train", "Score a run's test cases, or others' predictions."
    ),
    "predict": _Entry(
        "train.scoring_commands", "train", "Segment volumes with a fine-tuned run.", resumes=True
    ),
    "study": _Entry("train.study.commands", "train", "Compare methods over counts and seeds.", resumes=True),
    "report": _Entry("train.commands", "train", "Write one HTML page on runs or a study."),
    "export": _Entry("train.export.commands", "train", "Write a trained network for another framework."),
    "doctor": _Entry("supercl_core.commands", "", "Show versions, devices and what is missing."),
}

EXIT_CODES: Final = """\b
Exit codes:
  0    done
  1    failure
  2    wrong usage
  3    some cases failed (listed), the others are done
  4    cache incomplete, damaged, in use, or not the one asked for
  5    preempted; a checkpoint is written
  130  interrupted
"""


class _Commands(click.Group):
    """Commands from the table; their help needs no import of their module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module = importlib.import_module(entry.module)
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            entry = COMMANDS.get(ctx.invoked_subcommand or "")
            how = "goes on where it stopped" if entry and entry.resumes else "starts anew"
            click.echo(f"interrupted; the same command {how}", err=True)
            sys.exit(130)
        except (SuperCLError, OSError):
            if ctx.params["verbose"]:
                traceback.print_exc()
            raise
        except ModuleNotFoundError as error:
            # Commands import what is heavy when they run, so a missing half shows up here.
            name = ctx.invoked_subcommand or ""
            entry = COMMANDS.get(name)
            ours = (error.name or "").split(".")[0] in ("supercl_core", "preprocess", "train")
            if entry is None or not entry.extra or ours:
                raise
            raise SuperCLError(
                f"`supercl {name}` needs the extra {entry.extra!r}.",
                found=f"no module {error.name!r}",
                next_step=f"pip install 'supercl[{entry.extra}]'",
            ) from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            ctx.fail(f"No such command {args[0]!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary()) for name, entry in COMMANDS.items()])


@click.group(cls=_Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="supercl", prog_name="supercl")
@click.option(
    "-v", "--verbose", is_flag=True, help="Also show where an error arose, and the logs of libraries."
)
@click.option("-q", "--quiet", is_flag=True, help="No progress and no notes: only results and errors.")
@click.pass_context
def supercl(context: click.Context, verbose: bool, quiet: bool) -> None:
    """Superpixel-guided contrastive pre-training for medical image segmentation.

    \b
    The road:  phantom -> preprocess -> pretrain -> finetune -> evaluate -> report
    Results go to stdout, progress and logs to stderr. `supercl COMMAND --help` explains a command.
    """
    if os.environ.get("NO_COLOR"):
        context.color = False
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with one of the documented codes."""
    # Worker processes would look for modules in the working folder first, which may be that of the data.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    try:
        supercl.main(args=arguments, prog_name="supercl", standalone_mode=False)
    except SuperCLError as error:
        click.echo(f"error: {error.message()}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(1)  # whoever read our output has left
    except OSError as error:
        failure = storage_error(error)
        click.echo(f"error: {failure.message()}", err=True)
        sys.exit(failure.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
