"""Renames the published parameters of others to ours: every leaf finds its place, or the file is refused."""

from collections.abc import Mapping

import numpy as np

from dpnb.models.nf_resnet import RELU_GAIN

Arrays = dict[str, np.ndarray]
FLOOR = 1e-4  # of our weight standardisation, see `dpnb.models.layers.standardise`
TIMM_EPSILON = 1e-5  # added to the variance there


class Leaves:
    """The leaves of a file, taken one by one; missing or unused leaves mean that it is another network.

    Raises:
      ValueError: a layer is not a dict of arrays. Nested lists are refused: a small pickle can hold many.
    """

    def __init__(self, layers: Mapping[str, Mapping[str, np.ndarray]]):
        for name, leaves in layers.items():
            kinds = [type(a) for a in leaves.values()] if isinstance(leaves, Mapping) else [type(leaves)]
            wrong = {kind.__name__ for kind in kinds if not issubclass(kind, (np.ndarray, np.generic))}
            if wrong:
                raise ValueError(
                    f"layer {name!r} must be a dict of arrays, got {sorted(wrong)}; another network?"
                )
        self.left = {name: dict(leaves) for name, leaves in layers.items()}
        self.missing: list[str] = []
        self.made: Arrays = {}

    def take(self, ours: str, theirs: str, **leaves: str) -> None:
        """Takes layer `theirs` as our layer `ours`; leaves: {our name: their name}."""
        found = self.left.pop(theirs, {})
        for our_leaf, their_leaf in leaves.items():
            if their_leaf not in found:
                self.missing.append(f"{theirs}/{their_leaf}")
                continue
            array = np.asarray(found.pop(their_leaf), np.float32)
            # Old group norms keep their scale as [1, 1, 1, channels], PyTorch gains as [channels, 1, 1, 1].
            flat = our_leaf in ("scale", "bias", "gain")
            self.made["/".join(filter(None, (ours, our_leaf)))] = array.reshape(-1) if flat else array
        if found:
            self.left[theirs] = found

    def finish(self, network: str) -> Arrays:
        """Returns all that was taken, by our names.

        Raises:
          ValueError: leaves are missing or left over.
        """
        if self.missing or self.left:
            raise ValueError(
                f"the file must hold a {network}, got one without {self.missing[:3]} and with "
                f"{sorted(self.left)[:3]} beyond it; another depth?"
            )
        return dict(sorted(self.made.items()))


CONV = dict(kernel="w", gain="gain", bias="bias")
NORM = dict(scale="scale", bias="offset")
LINEAR = dict(kernel="w", bias="b")


def wide_resnet_from_haiku(params: Mapping[str, Arrays], depth: int) -> Arrays:
    """Renames the parameters of a Wide-ResNet from Haiku's names to ours.

    The layers compute the same: padding is SAME in both, the constant of weight standardisation is 1e-4,
    that of the group norm 1e-5.

    Args:
      params: {"wide_res_net/First_conv": {"w": ..., "gain": ..., "bias": ...}, ...}; files of the
        first release also have "~conv_fn/" and "~norm_fn/" in their names, which are dropped.
      depth: 6 n + 4.
    Raises:
      ValueError: names are missing or left over: another depth, or another network.
    """
    leaves = Leaves(
        {
            name.split("wide_res_net/")[-1]
            .replace("~conv_fn/", "")
            .replace("~norm_fn/", "")
            .lstrip("~/"): layer
            for name, layer in params.items()
        }
    )
    leaves.take("stem", "First_conv", **CONV)
    n = (depth - 4) // 6
    for stage in range(3):
        block = f"Block_{stage + 1}"
        leaves.take(f"blocks/{stage * n}/skip_norm", f"{block}_skip_norm", **NORM)
        leaves.take(f"blocks/{stage * n}/skip_conv", f"{block}_skip_conv", **CONV)
        for i in range(n):
            for j in range(2):
                leaves.take(f"blocks/{stage * n + i}/norm{j + 1}", f"{block}_norm_{i}_{j}", **NORM)
                leaves.take(f"blocks/{stage * n + i}/conv{j + 1}", f"{block}Conv_{i}_{j}", **CONV)
    leaves.take("norm", "Final_norm", **NORM)
    leaves.take("linear", "Softmax", **LINEAR)
    return leaves.finish(f"Wide-ResNet of depth {depth}")


def nfnet_from_haiku(params: Mapping[str, Arrays], depths: tuple[int, ...]) -> Arrays:
    """Renames the parameters of an NFNet from Haiku's names to ours; the layers compute the same.

    Args:
      params: {"NFNet/~/stem_conv0": {"w": ..., "gain": ..., "bias": ...}, "NFNet/~/nf_block":
        {"skip_gain": ...}, "NFNet/~/nf_block_1/~/conv0": ...}.
      depths: blocks in each stage.
    Raises:
      ValueError: names are missing or left over.
    """
    leaves = Leaves({name.replace("~/", "").removeprefix("NFNet/"): layer for name, layer in params.items()})
    stem = [f"stem_conv{i}" for i in range(4)]
    blocks = [f"nf_block_{i}" if i else "nf_block" for i in range(sum(depths))]
    return _nfnet(leaves, depths, stem, blocks, _HAIKU_PARTS, "linear", CONV, LINEAR)


def nfnet_from_timm(state: Arrays, depths: tuple[int, ...]) -> Arrays:
    """Converts timm's `dm_nfnet_*`, whose paddings and gains are where ours are, to our NFNet.

    timm computes GELU exactly, DeepMind and dpnb by its usual approximation: outputs agree to about 1e-3.

    Args:
      state: {"stages.0.0.conv1.weight": ..., ...}, as in its safetensors file.
      depths: blocks in each stage.
    Raises:
      ValueError: names are missing or left over.
    """
    stem = [f"stem.conv{i}" for i in range(1, 5)]
    parts = _timm(state), depths, stem, _timm_blocks(depths), _TIMM_PARTS, "head.fc"
    return _channels_last(_nfnet(*parts, _TIMM_CONV, _TIMM_LINEAR))


_HAIKU_PARTS = {
    "conv0": "/conv0", "conv1": "/conv1", "conv1b": "/conv1b", "conv2": "/conv2", "shortcut": "/conv_shortcut",
    "excite/squeeze": "/squeeze_excite/linear", "excite/excite": "/squeeze_excite/linear_1", "skip_gain": "skip_gain",
}  # fmt: skip
_TIMM_PARTS = {
    "conv0": ".conv1", "conv1": ".conv2", "conv1b": ".conv2b", "conv2": ".conv3", "shortcut": ".downsample.conv",
    "excite/squeeze": ".attn_last.fc1", "excite/excite": ".attn_last.fc2", "skip_gain": "skipinit_gain",
}  # fmt: skip


def _nfnet(leaves: Leaves, depths, stem, blocks, parts, classifier: str, conv, linear) -> Arrays:
    """Takes every part of an NFNet; `parts`: {our part of a block: what follows their block's name}."""
    for i, theirs in enumerate(stem):
        leaves.take(f"stem/{i}", theirs, **conv)
    first = _firsts(depths)
    for i, theirs in enumerate(blocks):
        ours = f"blocks/{i}"
        for part in ("conv0", "conv1", "conv1b", "conv2", *(["shortcut"] if i in first else [])):
            leaves.take(f"{ours}/{part}", theirs + parts[part], **conv)
        for part in ("excite/squeeze", "excite/excite"):
            leaves.take(f"{ours}/{part}", theirs + parts[part], **linear)
        leaves.take(ours, theirs, skip_gain=parts["skip_gain"])
    leaves.take("final", "final_conv", **conv)
    leaves.take("linear", classifier, **linear)
    return leaves.finish(f"NFNet of {depths} blocks")


def _firsts(depths: tuple[int, ...]) -> set[int]:
    """Returns the numbers of the blocks that begin a stage and project their shortcut."""
    return {sum(depths[:stage]) for stage in range(len(depths))}


def nf_resnet_from_timm(state: Arrays, depths: tuple[int, ...]) -> Arrays:
    """Converts timm's `nf_resnet*` to our NFResNet with published_by="timm".

    In timm the gain of a ReLU is part of the convolution after it, here of the ReLU itself. The product is
    the same, except in the stem, which no ReLU precedes (its gain grows), and in the classifier, which a
    ReLU precedes (its kernel shrinks). Branches have no skip gain in timm, so it is 1 here.

    Args, Raises: as in `nfnet_from_timm`.
    """
    leaves = _timm(state)
    leaves.take("stem", "stem.conv", **_TIMM_CONV)
    first = _firsts(depths)
    for number, theirs in enumerate(_timm_blocks(depths)):
        ours = f"blocks/{number}"
        for i in range(3):
            leaves.take(f"{ours}/conv{i}", f"{theirs}.conv{i + 1}", **_TIMM_CONV)
        if number in first:
            leaves.take(f"{ours}/shortcut", f"{theirs}.downsample.conv", **_TIMM_CONV)
        leaves.made[f"{ours}/skip_gain"] = np.ones((), np.float32)
    leaves.take("linear", "head.fc", **_TIMM_LINEAR)
    made = _channels_last(leaves.finish(f"NF-ResNet of {depths} blocks"))
    made["stem/gain"] = made["stem/gain"] * np.float32(RELU_GAIN)
    made["linear/kernel"] = made["linear/kernel"] / np.float32(RELU_GAIN)
    return made


_TIMM_CONV = dict(kernel="weight", gain="gain", bias="bias")
_TIMM_LINEAR = dict(kernel="weight", bias="bias")


def _timm(state: Arrays) -> Leaves:
    layers: dict[str, Arrays] = {}
    for name, array in state.items():
        layer, _, leaf = name.rpartition(".")
        layers.setdefault(layer, {})[leaf] = array
    return Leaves(layers)


def _timm_blocks(depths: tuple[int, ...]) -> list[str]:
    return [f"stages.{stage}.{block}" for stage, depth in enumerate(depths) for block in range(depth)]


def _channels_last(arrays: Arrays) -> Arrays:
    """Transposes PyTorch's kernels, and changes gains such that our standardisation gives timm's weights.

    [out, in, h, w] becomes [h, w, in, out], and linear layers [out, in] become [in, out]. For variance v and
    fan-in n ours divides by sqrt(max(v n, 1e-4)), timm's by sqrt((v + 1e-5) n); the gains make up for it.
    """
    made = {}
    for name, array in arrays.items():
        if name.endswith("/kernel"):
            linear = "/excite/" in name or name.startswith("linear/")
            array = array.reshape(array.shape[:2]).T if linear else array.transpose(2, 3, 1, 0)
        made[name] = np.array(array, order="C")
    for name in [n for n in made if n.endswith("/gain")]:
        kernel = made[name.removesuffix("gain") + "kernel"].astype(np.float64)
        fan_in, variance = kernel[..., 0].size, kernel.var((0, 1, 2))
        ours, theirs = np.maximum(variance * fan_in, FLOOR), (variance + TIMM_EPSILON) * fan_in
        made[name] = (made[name] * np.sqrt(ours / theirs)).astype(np.float32)
    return made
