"""``kmerge-mlx convert`` and ``kmerge-mlx export``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kmerge_mlx.adapters.packing import BITS, GROUP_SIZES
from kmerge_mlx.cli.inputs import command
from kmerge_mlx.cli.output import bar, note
from kmerge_mlx.errors import SettingsError
from kmerge_mlx.settings import ModelSettings, Settings, argument, option


@dataclass(frozen=True)
class ConvertSettings(Settings):
    """What to convert, and where to."""

    NAME = "convert"
    ELSEWHERE = dict.fromkeys(
        ("quantize", "q", "q_bits", "hf_path", "mlx_path"),
        "this command takes a checkpoint, SRC, and writes an adapter, DST; `kmerge-mlx quantize` "
        "takes a --model, and writes an --mlx-path",
    )

    source: str = argument("SRC", "Checkpoint folder, or hub repo id (user/name@revision).")
    destination: str = argument("DST", "Adapter folder to write; of LCLM, a model folder.")
    model: str | None = option(
        None, str, "Base model, a folder or repo id: checks the fit and records what it says."
    )
    k: int | None = ModelSettings.setting("k")
    dtype: str | None = option(
        None, str, "Cast the weights. Default: keep.", choices=("float32", "float16", "bfloat16")
    )
    q_bits: int | None = option(
        None, int, "LCLM alone: bits of the decoder's weights. Default: keep.", choices=BITS
    )
    encoder_bits: int | None = option(
        None, int, "LCLM alone: bits of the encoder's weights. Default: keep.", choices=BITS
    )
    q_group_size: int | None = option(
        None,
        int,
        f"Packed weights that share a scale. Default: {GROUP_SIZES[0]}.",
        choices=GROUP_SIZES,
    )
    force: bool = option(False, bool, "Replace what an earlier run wrote to DST.")

    def clashes(self) -> list[str]:
        if self.q_group_size is None or (self.q_bits, self.encoder_bits) != (None, None):
            return []
        return ["`q_group_size` is of packed weights: give `q_bits` or `encoder_bits` with it"]


@command(ConvertSettings)
def convert(settings: ConvertSettings) -> None:
    """Turn a PyTorch checkpoint into an MLX adapter folder, or one of LCLM into a model folder.

    The checkpoint is a folder with encoder.pth and a PEFT LoRA, or with LCLM's decoder, encoder and
    adapter; or a hub repo of one. Needs no PyTorch and executes nothing from the files. DST is
    written whole or not at all.

    \b
    Examples:
      kmerge-mlx convert outputs/textualized_tree/large/step_last ./adapter
      kmerge-mlx convert ./checkpoint ./adapter --model Qwen/Qwen2.5-0.5B --k 4
      kmerge-mlx convert ./checkpoint ./adapter --dtype bfloat16 --force
      kmerge-mlx convert latent-context/0.6b-4b-LCLM-4x ./lclm --q-bits 4 --encoder-bits 8
    """
    from kmerge_mlx.convert.checkpoint import convert_checkpoint
    from kmerge_mlx.convert.window import Packing, convert_window, find_window

    given, say = asdict(settings), lambda text: note(f"note: {text}")
    bits, size = (given.pop("q_bits"), given.pop("encoder_bits")), given.pop("q_group_size")
    packing = Packing(*bits, size or GROUP_SIZES[0])
    if (root := find_window(settings.source)) is not None:
        made = convert_window(root, **given, packing=packing, progress=bar, note=say)
        sizes = made.encoder
        note(
            f"{settings.destination}: K = {made.merge_factor}, windows of {sizes.window:,} tokens, "
            f"{sizes.pooling} of {sizes.merge_factor}, D = {sizes.hidden_size}, base "
            f"{made.base.id or 'in the folder'}"
        )
        return
    if {*settings.given()} & {"q_bits", "encoder_bits", "q_group_size"}:
        raise SettingsError(
            "`q_bits`, `encoder_bits` and `q_group_size` are for LCLM's checkpoints"
        )
    adapter = convert_checkpoint(**given, note=say)
    _show(adapter, settings.destination)
    if settings.model is None and not adapter.merge.base.fields:
        note("note: without --model, only sizes tell a wrong base when the adapter is loaded")


@dataclass(frozen=True)
class ExportSettings(Settings):
    """What to export, and where to."""

    NAME = "export"

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

    adapter = export_adapter(**asdict(settings))
    _show(adapter, settings.destination)
    merge = adapter.merge
    if merge.encoder is None:
        note("note: K = 1 merges nothing: there is no encoder.pth")
    elif merge.layout is not None and (merge.layout.merges != ALL or merge.layout.chat_template):
        note(
            "note: the paper's code merges the whole prompt and applies no chat template; "
            "kmerge.json says how this adapter was trained"
        )


def _show(adapter: Any, destination: str) -> None:
    """One line on an adapter that was written."""
    merge = adapter.merge
    encoder = "" if merge.encoder is None else f"D = {merge.encoder.hidden_size}, "
    tensors = adapter.encoder_weights | adapter.tuning_weights | adapter.head_weights
    size = sum(array.nbytes for array in tensors.values())
    note(
        f"{destination}: K = {merge.merge_factor}, {encoder}{len(tensors)} tensors, "
        f"{size / 1e6:.1f} MB, base {merge.base.id or 'not named'}"
    )
