"""Options of the command line that commands of several packages have."""

from __future__ import annotations

from typing import Final

import click

json_option: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")

layout_option: Final = click.option(
    "--layout",
    metavar="NAME",
    help="How the folder INPUT is arranged, such as msd, nnunet, dicom or plain [default: recognised].",
)
