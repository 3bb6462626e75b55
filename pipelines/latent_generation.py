"""The pipeline: a tokenizer and a prior as one object that samples images, with the habits of diffusers' pipelines.

    class labels → prior.sample → indices or latents → tokenizer.decode_… → pixels

With a picture given, a part of its codes is kept and the rest drawn (`editing`). One generator yields one seed an image, drawn
up front, so that image i has the same draws at any batch size.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.editing import DEFAULT_STRENGTH, Edit, ImagesLike, check_edit
from pipelines.hub import create_repository, fetch_card, local_folder, upload_folder
from pipelines.saving import INDEX, PARTS, PipelineParts, load_parts, save_parts
from stage1_tokenizer.data.image_loader import images_at_once
from stage1_tokenizer.data.image_processor import to_pil
from stage1_tokenizer.tokenizer import Tokenizer
from stage2_prior.prior import UNKNOWN, KnownCodes, Prior, randn_per_image
from training_harness.configuration import suggest_nearest
from training_harness.errors import SpecMismatchError, UserError
from training_harness.processes import accelerated_device
from training_harness.progress import progress_bar

DEFAULT_BATCH_SIZE = 100

Images = list[Image.Image] | np.ndarray | Tensor
StepCallback = Callable[["LatentGenerationPipeline", int, int, dict[str, Any]], Any]


class ImagePipelineOutput(NamedTuple):
    images: Images  # list of PIL images; or (N, H, W, C) float32 in [0, 1]; or a tensor (N, C, H, W) in [0, 1]


class LatentGenerationPipeline:
    """Samples images.

    Args:
        tokenizer, prior: trained on one another's codes; SpecMismatchError if not.
        label_names: names of the classes by id, or none.
        sampling: what `__call__` uses for the options it is not given, an instance of the prior's `options_class`.
        trained_classes: ids of the classes that had training images, which are sampled where no class is named; by default all.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prior: Prior,
        label_names: Sequence[str] | None = None,
        sampling: Any = None,
        trained_classes: Sequence[int] | None = None,
    ) -> None:
        prior.check_spec(tokenizer.latent_spec())
        if label_names is not None and len(label_names) != prior.config.num_classes:
            raise SpecMismatchError(
                f"{len(label_names)} label names were given for a prior of {prior.config.num_classes} classes; "
                "expected one name a class"
            )
        self.tokenizer, self.prior = tokenizer.eval(), prior.eval()
        self.label_names = tuple(label_names) if label_names is not None else None
        self.sampling = sampling or prior.options_class()
        every_class = range(prior.config.num_classes)
        self.trained_classes = tuple(i for i in every_class if trained_classes is None or i in trained_classes)
        self._progress_bar_config: dict[str, Any] = {"disable": None}

    # -- sampling -------------------------------------------------------------------------------------------------

    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_images_per_label: int = 1,
        batch_size: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        image: ImagesLike | None = None,
        mask_image: ImagesLike | None = None,
        strength: float | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> ImagePipelineOutput | tuple[Images]:
        """Samples `num_images_per_label` images of each label, label after label.

        Args:
            class_labels: one or several ids or names; none samples without a class.
            batch_size: images a forward pass; the images do not depend on it.
            generator: one, from which each image's seed is drawn; or one an image; none is random.
            image: what to go on from: PIL pictures, arrays (h, w, C) or tensors (C, h, w), of uint8 or in [0, 1]; one, or one a
                label. A picture of another size is cropped and resized as in training. To a prior that restores, what it restores.
            mask_image: white where to draw, black where the picture stays exactly as it is; of the picture's size.
            strength: share in (0, 1] of the codes that are drawn anew, or for a diffusion prior how much noise is laid on the
                picture; by default 1 under a mask, and 0.8 without one.
            latents: (N, c, rows, columns) ~ N(0, I), the noise that a prior of latents makes the N images of; by default drawn.
            callback_on_step_end: called as f(pipeline, step, step, {"tokens": the grid so far (B, h, w), −1 where there is no
                code yet}), or with "latents"; `decode` makes a picture of either.
            options: those of the prior; for an autoregressive one the fields of `SamplingOptions`, for a diffusion prior those of
                `DiffusionOptions`, for a standard normal one temperature.
        Returns:
            ImagePipelineOutput(images), or (images,) with return_dict=False.
        Raises:
            UserError for a class that does not exist, a count below 1, an option that the prior does not take, or a picture or
            mask that do not fit.
        """
        if output_type not in ("pil", "np", "pt"):
            raise UserError(f"output_type is {output_type!r}; expected 'pil', 'np' or 'pt'")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; expected at least 1")
        if num_images_per_label < 1:
            raise UserError(f"num_images_per_label is {num_images_per_label}; expected at least 1")
        check_edit(image, mask_image, strength)
        if self.prior.is_restoration and (mask_image is not None or strength is not None):
            raise UserError(
                "mask_image or strength was given to a prior that restores whole pictures; expected image alone"
            )
        labels = torch.tensor(self.label_ids(class_labels))
        of_latents = self.prior.output_kind == "latents"
        edit = None
        if image is not None:
            edit = Edit.of(self.tokenizer, image, mask_image, of_latents, batch_size)
        if edit is not None and len(edit.originals) != len(labels):
            labels, edit = matched(labels, edit)
        labels = labels.repeat_interleave(num_images_per_label)
        generators, known = image_generators(generator, len(labels)), None
        if edit is not None:
            edit = edit.repeated(num_images_per_label)
            whole = mask_image is not None or self.prior.is_restoration
            strength = strength or (1.0 if whole else DEFAULT_STRENGTH)
            known = (
                KnownCodes(edit.codes, ~edit.masked_region, strength)
                if of_latents
                else edit.known(strength, self.prior.supports_any_order, generators)
            )
        pictures = self.sample_pixels(labels, generators, batch_size, callback_on_step_end, known, latents, **options)
        if edit is not None:
            pictures = edit.composited(pictures)
        images = self._as(output_type, pictures)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def sample_pixels(
        self,
        labels: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        known: KnownCodes | None = None,
        noise: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """One image for each class id of (N,) int64, −1 for no class: float32 (N, C, h, w) in [0, 1], on the CPU."""
        generators = image_generators(generator, len(labels))
        chosen = self.sampling_options(options)
        spec = self.tokenizer.latent_spec()
        if noise is not None and noise.shape != (wanted := (len(labels), spec.channels, spec.height, spec.width)):
            raise UserError(
                f"latents are {tuple(noise.shape)}; expected {wanted}, for each image the noise that it is made of"
            )
        size = batch_size or DEFAULT_BATCH_SIZE
        starts = range(0, len(labels), size)
        pictures = list[Tensor]()
        steps = self.prior.num_steps(spec, chosen)
        shown = {"total": len(starts) * steps, "desc": "sample", "unit": "step"} | self._progress_bar_config
        with progress_bar(**shown) as bar:

            def on_step(step: int, codes: Tensor) -> None:
                bar.update(len(pictures) * steps + step + 1 - bar.n)  # what is known takes no step
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step, step, {self.prior.output_kind: codes})

            for start in starts:
                part = slice(start, start + size)
                given = known and KnownCodes(
                    known.codes[part].to(self.device), known.known_mask[part].to(self.device), known.strength
                )
                classes, begun = labels[part].to(self.device), None if noise is None else noise[part]
                codes = self.prior.sample(spec, classes, chosen, generators[part], on_step, given, begun)
                pictures.append(self.decode(codes))
        return torch.cat(pictures)

    def interpolate(
        self,
        seed: int,
        other_seed: int,
        num_images: int = 8,
        class_labels: int | str | Sequence[int | str] | None = None,
        **arguments: Any,
    ) -> ImagePipelineOutput | tuple[Images]:
        """`num_images` of each label on the way from the noise of one seed to that of another.

            ε_s = cos(π s / 2) ε_0 + sin(π s / 2) ε_1,    s from 0 to 1; for every s this is ~ N(0, I)

        The first is what the label gives with `generator=torch.Generator().manual_seed(seed)`.

        Args:
            arguments: of `__call__`.
        """
        spec, count = self.tokenizer.latent_spec(), len(self.label_ids(class_labels)) * num_images
        if num_images < 2:
            raise UserError(f"num_images is {num_images}; expected at least 2, the ends of the way")
        generators = [image_generators(torch.Generator().manual_seed(s), 1)[0] for s in (seed, other_seed)]
        first, last = randn_per_image((spec.channels, spec.height, spec.width), generators)
        angles = torch.linspace(0, math.pi / 2, num_images).view(-1, 1, 1, 1)
        noise = (angles.cos() * first + angles.sin() * last).repeat(count // num_images, 1, 1, 1)
        own = [generators[0].clone_state() for _ in range(count)]
        return self(class_labels, num_images, generator=own, latents=noise, **arguments)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Indices (B, h, w) int64 or latents (B, c, h, w) → float32 (B, C, H, W) in [0, 1] on the CPU, without padding.

        Where a grid has no code yet, −1, the mean latent stands.
        """
        size = images_at_once(self.tokenizer.config.image_size)
        return torch.cat([self._decoded(part.to(self.tokenizer.device)) for part in codes.split(size)])

    def _decoded(self, codes: Tensor) -> Tensor:
        tokenizer = self.tokenizer
        if codes.is_floating_point():
            pixels = tokenizer.decode_latents(codes.to(tokenizer.dtype))
        else:
            known = (codes != UNKNOWN).view(len(codes), -1, *codes.shape[-2:]).all(1)
            pixels = tokenizer.decode_indices(codes, None if known.all() else known)
        return tokenizer.config.image_processor.to_unit_range(pixels).cpu()

    def label_ids(self, class_labels: int | str | Sequence[int | str] | None) -> list[int]:
        """Ids of one or several classes given by id or name; −1, no class, for none."""
        if class_labels is None:
            return [-1]
        if isinstance(class_labels, int | str):
            class_labels = [class_labels]
        if len(class_labels) == 0:
            raise UserError(
                "class_labels is empty; expected ids or names of classes, or none to sample without a class"
            )
        return [self._label_id(label) for label in class_labels]

    def _label_id(self, label: int | str) -> int:
        names, count = self.label_names or (), self.prior.config.num_classes
        label = label if isinstance(label, str) else operator.index(label)  # NumPy's and torch's integers too
        if label in names:
            return names.index(label)
        if count == 0:
            raise UserError(f"class {label!r} was asked for, and this pipeline was trained without classes; give none")
        number = int(label) if isinstance(label, int) or label.isdecimal() else None
        if number is not None and 0 <= number < count:
            return number
        known = (
            suggest_nearest(str(label), list(names))
            if names and number is None
            else f"expected an id from 0 to {count - 1}"
        )
        raise UserError(f"no class {label!r}; {known}")

    def sampling_options(self, options: dict[str, Any]) -> Any:
        """The defaults with `options` over them; those that are none are as good as not given."""
        given = {name: value for name, value in options.items() if value is not None}
        taken = [field.name for field in dataclasses.fields(self.prior.options_class)]
        for name in given:
            if name not in taken:
                raise UserError(
                    f"{name} is no option of a {type(self.prior).__name__}; expected any of: {', '.join(taken)}"
                )
        return dataclasses.replace(self.sampling, **given)

    @staticmethod
    def _as(output_type: str, pictures: Tensor) -> Images:
        if output_type == "pt":
            return pictures
        if output_type == "np":
            return pictures.permute(0, 2, 3, 1).numpy()
        return to_pil(to_uint8(pictures))

    def set_progress_bar_config(self, **config: Any) -> None:
        """Arguments of tqdm, such as `disable=True`."""
        self._progress_bar_config = config

    # -- devices --------------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves both models to a device, and to a dtype for both; returns itself."""
        for model in (self.tokenizer, self.prior):
            model.to(device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        return self.prior.device

    # -- saving and loading ---------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        metrics: dict[str, Any] | None = None,
        samples: Image.Image | None = None,
        repo_id: str | None = None,
    ) -> None:
        """Writes model_index.json, tokenizer/, prior/ and README.md, with metrics and a sample grid in the card if given.

        An earlier pipeline in the folder is replaced, other files stay. In the card, what stands outside our markers stays.
        Raises UserError when one of these names is taken by something that no pipeline wrote.
        """
        parts = PipelineParts(self.tokenizer, self.prior, self.label_names, self.sampling, self.trained_classes)
        save_parts(Path(save_directory), parts, type(self).__name__, metrics, samples, repo_id)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device_map: str | dict[str, Any] | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """Loads a pipeline folder, a run folder that holds one, or a Hub repository.

        Args:
            device_map: "auto" for the device that Accelerate finds, a device such as "cuda:0", or one for each part,
                such as {"tokenizer": "cpu", "prior": "cuda:0"}.
        Raises:
            UserError when a file is missing, cut short or does not fit the others.
        """
        folder = local_folder(source, INDEX, "pipeline", revision=revision, token=token, cache_dir=cache_dir)
        pipeline = cls(*load_parts(folder, dtype))
        if device_map is not None:
            places = device_map if isinstance(device_map, dict) else dict.fromkeys(PARTS, device_map)
            for name, place in places.items():
                if name not in PARTS:
                    raise UserError(f"device_map names {name!r}; expected 'tokenizer' or 'prior'")
                getattr(pipeline, name).to(accelerated_device() if place == "auto" else place)
        return pipeline

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload latentloom pipeline",
        metrics: dict[str, Any] | None = None,
        samples: Image.Image | None = None,
    ) -> str:
        """Creates the repository when there is none and uploads the pipeline; returns the commit's address."""
        repo_id = create_repository(repo_id, private=private, token=token)
        with TemporaryDirectory() as temporary:
            folder = Path(temporary) / "pipeline"
            fetch_card(repo_id, folder, token=token)
            self.save_pretrained(folder, metrics=metrics, samples=samples, repo_id=repo_id)
            return upload_folder(folder, repo_id, token=token, commit_message=commit_message)


def matched(labels: Tensor, edit: Edit) -> tuple[Tensor, Edit]:
    """One label for several pictures, or one picture for several labels."""
    if len(labels) == 1:
        return labels.expand(len(edit.originals)), edit
    if len(edit.originals) == 1:
        return labels, edit.repeated(len(labels))
    raise UserError(
        f"{len(edit.originals)} images were given for {len(labels)} class labels; expected one, or one a label"
    )


def image_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> Sequence[torch.Generator]:
    """One generator an image: those given, or new ones whose seeds the one given yields up front."""
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if isinstance(generator, torch.Generator):
        seeds = torch.randint(2**63 - 1, (count,), generator=generator, device=generator.device)
        return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    if len(generator) != count:
        raise UserError(f"{len(generator)} generators were given for {count} images; expected one, or one an image")
    return generator


def to_uint8(pictures: Tensor) -> Tensor:
    """[0, 1] → 0 … 255, rounded."""
    return (pictures * 255).round().to(torch.uint8)
