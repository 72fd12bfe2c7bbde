"""``kmerge-mlx export``."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from kmerge_mlx.cli.convert import summary
from kmerge_mlx.cli.inputs import command
from kmerge_mlx.settings import ModelSettings, Settings, argument, option


@dataclass(frozen=True)
class ExportSettings(Settings):
    """What to export, and where to."""

    source: str = argument("ADAPTER", "Adapter folder, or a folder of several K.")
    destination: str = argument("DST", "Folder to write.")
    k: int | None = ModelSettings.setting("k")
    force: bool = option(False, bool, "Replace an exported adapter at DST.")


@command(ExportSettings)
def export(settings: ExportSettings) -> None:
    """Turn an adapter folder back into a PyTorch checkpoint.

    DST gets encoder.pth, a PEFT LoRA, and kmerge.json for what those cannot say: the paper's code
    and PEFT load it, and `kmerge-mlx convert` gives the same adapter again, bit for bit. Needs no
    PyTorch. DST is written whole or not at all.

    \b
    Examples:
      kmerge-mlx export ./adapter ./checkpoint
      kmerge-mlx export ./adapters ./checkpoint --k 4 --force
    """
    from kmerge_mlx.convert.export import export_adapter
    from kmerge_mlx.prompts.lay_out import ALL

    adapter = export_adapter(settings.source, settings.destination, settings.k, settings.force)
    print(summary(adapter, settings.destination), file=sys.stderr)
    merge = adapter.merge
    if merge.encoder is None:
        print("note: K = 1 merges nothing: there is no encoder.pth", file=sys.stderr)
    elif merge.layout is not None and (merge.layout.merges != ALL or merge.layout.chat_template):
        print(
            "note: the paper's code merges the whole prompt and applies no chat template; "
            "kmerge.json says how this adapter was trained",
            file=sys.stderr,
        )
