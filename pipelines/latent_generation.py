"""The pipeline: a tokenizer and a prior as one object that samples images, with the interface of diffusers' pipelines.

    class labels → prior.sample → indices or latents → tokenizer.decode_… → pixels

If the user passes an image, a part of its codes is kept and the rest is generated (`editing`). Each image has a generator
of its own. The seeds of these generators are drawn before sampling starts, so image i is the same at any batch size.
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
from stage1_tokenizer.data.image_loader import inference_batch_size
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
    """Sample images with a tokenizer and a prior.

    Args:
        tokenizer: decodes what the prior samples.
        prior: trained on the codes of this tokenizer.
        label_names: names of the classes by id, or None.
        sampling: defaults for the sampling options of `__call__`, an instance of the prior's `options_class`.
        trained_classes: ids of the classes that had training images; by default all classes. Commands sample these classes
            if the user names none.

    Raises:
        SpecMismatchError: if the prior was trained on codes of another tokenizer.
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
                "expected one name for each class"
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
        """Sample `num_images_per_label` images of each label, label after label.

        Args:
            class_labels: one or several ids or names; None samples without a class.
            batch_size: images in one forward pass; the images do not depend on it.
            generator: one generator, which yields a seed for each image, or one generator for each image; None is random.
            image: images to edit or to restore: one, or one for each label. PIL images, arrays (h, w, C) or tensors (C, h, w);
                uint8, or float in [0, 1]. An image of another size is cropped and resized as in training.
            mask_image: white where to generate, black where the image stays exactly as it is; of the image's size.
            strength: share in (0, 1] of the codes to generate again; for a diffusion prior, the amount of noise added to the
                image. By default 1 with a mask and 0.8 without one.
            latents: (N, c, rows, columns) ~ N(0, I), the noise from which a prior of latents starts; by default random.
            callback_on_step_end: called as f(pipeline, step, step, {"tokens": codes}) with codes (B, h, w), −1 at positions
                without a code yet, or with {"latents": latents}. Pass either to `decode` to see the image.
            options: sampling options of the prior: the fields of `SamplingOptions` for an autoregressive prior, the fields of
                `DiffusionOptions` for a diffusion prior, `temperature` for a standard normal prior.

        Returns:
            ImagePipelineOutput(images), or (images,) with return_dict=False.

        Raises:
            UserError: for a class that does not exist, a count below 1, an option that the prior does not have, or an image or
                mask of a wrong shape or size.
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
                "mask_image or strength was given to a prior that restores whole images; expected image alone; leave both out"
            )
        labels = torch.tensor(self.label_ids(class_labels))
        samples_latents = self.prior.output_kind == "latents"
        edit = None
        if image is not None:
            edit = Edit.from_images(self.tokenizer, image, mask_image, samples_latents, batch_size)
        if edit is not None and len(edit.originals) != len(labels):
            labels, edit = match_labels_and_images(labels, edit)
        labels = labels.repeat_interleave(num_images_per_label)
        generators, known = image_generators(generator, len(labels)), None
        if edit is not None:
            edit = edit.repeat(num_images_per_label)
            regenerates_all = mask_image is not None or self.prior.is_restoration
            strength = strength or (1.0 if regenerates_all else DEFAULT_STRENGTH)
            known = (
                KnownCodes(edit.codes, ~edit.masked_region, strength)
                if samples_latents
                else edit.select_known_codes(strength, self.prior.supports_any_order, generators)
            )
        pixels = self.sample_pixels(labels, generators, batch_size, callback_on_step_end, known, latents, **options)
        if edit is not None:
            pixels = edit.composite(pixels)
        images = self._convert_output(output_type, pixels)
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
        """Sample one image for each label.

        Args:
            labels: (N,) int64 class ids, −1 for no class.
            known: codes of the N images that stay as they are.
            noise: (N, c, rows, columns) ~ N(0, I), the noise from which a prior of latents starts.
            options: sampling options of the prior.

        Returns:
            (N, C, h, w) float32 in [0, 1] on the CPU.
        """
        generators = image_generators(generator, len(labels))
        sampling = self.sampling_options(options)
        spec = self.tokenizer.latent_spec()
        noise_shape = (len(labels), spec.channels, spec.height, spec.width)
        if noise is not None and noise.shape != noise_shape:
            raise UserError(
                f"latents are {tuple(noise.shape)}; expected {noise_shape}, the initial noise of each image"
            )
        size = batch_size or DEFAULT_BATCH_SIZE
        starts = range(0, len(labels), size)
        pixels = list[Tensor]()
        num_steps = self.prior.num_steps(spec, sampling)
        bar_config = {"total": len(starts) * num_steps, "desc": "sample", "unit": "step"} | self._progress_bar_config
        with progress_bar(**bar_config) as bar:

            def on_step(step: int, codes: Tensor) -> None:
                # known codes take no step, so the bar moves to the step number
                bar.update(len(pixels) * num_steps + step + 1 - bar.n)
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step, step, {self.prior.output_kind: codes})

            for start in starts:
                batch = slice(start, start + size)
                known_batch = known and KnownCodes(
                    known.codes[batch].to(self.device), known.known_mask[batch].to(self.device), known.strength
                )
                noise_batch = None if noise is None else noise[batch]
                codes = self.prior.sample(
                    spec, labels[batch].to(self.device), sampling, generators[batch], on_step, known_batch, noise_batch
                )
                pixels.append(self.decode(codes))
        return torch.cat(pixels)

    def interpolate(
        self,
        seed: int,
        other_seed: int,
        num_images: int = 8,
        class_labels: int | str | Sequence[int | str] | None = None,
        **arguments: Any,
    ) -> ImagePipelineOutput | tuple[Images]:
        """Sample images while the noise moves from the noise of one seed to the noise of another.

            ε_s = cos(π s / 2) ε_0 + sin(π s / 2) ε_1,    s from 0 to 1; for every s this is ~ N(0, I)

        The first image equals the image that `__call__` samples with `generator=torch.Generator().manual_seed(seed)`.

        Args:
            num_images: images for each label, at least 2.
            arguments: further arguments of `__call__`.
        """
        spec, count = self.tokenizer.latent_spec(), len(self.label_ids(class_labels)) * num_images
        if num_images < 2:
            raise UserError(f"num_images is {num_images}; expected at least 2, one for each seed")
        generators = [image_generators(torch.Generator().manual_seed(s), 1)[0] for s in (seed, other_seed)]
        first, last = randn_per_image((spec.channels, spec.height, spec.width), generators)
        angles = torch.linspace(0, math.pi / 2, num_images).view(-1, 1, 1, 1)
        noise = (angles.cos() * first + angles.sin() * last).repeat(count // num_images, 1, 1, 1)
        image_states = [generators[0].clone_state() for _ in range(count)]
        return self(class_labels, num_images, generator=image_states, latents=noise, **arguments)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode indices or latents to pixels, without padding.

        Args:
            codes: indices (B, h, w) int64, or latents (B, c, h, w). A position without a code yet, −1, is decoded from the mean
                latent.

        Returns:
            (B, C, H, W) float32 in [0, 1] on the CPU.
        """
        size = inference_batch_size(self.tokenizer.config.image_size)
        return torch.cat([self._decode_batch(batch.to(self.tokenizer.device)) for batch in codes.split(size)])

    def _decode_batch(self, codes: Tensor) -> Tensor:
        tokenizer = self.tokenizer
        if codes.is_floating_point():
            pixels = tokenizer.decode_latents(codes.to(tokenizer.dtype))
        else:
            known_mask = (codes != UNKNOWN).view(len(codes), -1, *codes.shape[-2:]).all(1)
            pixels = tokenizer.decode_indices(codes, None if known_mask.all() else known_mask)
        return tokenizer.config.image_processor.to_unit_range(pixels).cpu()

    def label_ids(self, class_labels: int | str | Sequence[int | str] | None) -> list[int]:
        """Convert one or several class ids or names to a list of ids; None becomes [−1], no class."""
        if class_labels is None:
            return [-1]
        if isinstance(class_labels, int | str):
            class_labels = [class_labels]
        if len(class_labels) == 0:
            raise UserError(
                "class_labels is empty; expected ids or names of classes, or None to sample without a class"
            )
        return [self._label_id(label) for label in class_labels]

    def _label_id(self, label: int | str) -> int:
        names, count = self.label_names or (), self.prior.config.num_classes
        label = label if isinstance(label, str) else operator.index(label)  # NumPy's and torch's integers too
        if label in names:
            return names.index(label)
        if count == 0:
            raise UserError(f"class {label!r} was given, but this pipeline was trained without classes; leave it out")
        class_id = int(label) if isinstance(label, int) or label.isdecimal() else None
        if class_id is not None and 0 <= class_id < count:
            return class_id
        expected = (
            suggest_nearest(str(label), list(names))
            if names and class_id is None
            else f"expected an id from 0 to {count - 1}"
        )
        raise UserError(f"no class {label!r}; {expected}")

    def sampling_options(self, options: dict[str, Any]) -> Any:
        """Return the default sampling options, replaced by those of `options` that are not None."""
        changes = {name: value for name, value in options.items() if value is not None}
        valid_names = [field.name for field in dataclasses.fields(self.prior.options_class)]
        for name in changes:
            if name not in valid_names:
                raise UserError(
                    f"{name} is no option of a {type(self.prior).__name__}; expected any of: {', '.join(valid_names)}"
                )
        return dataclasses.replace(self.sampling, **changes)

    @staticmethod
    def _convert_output(output_type: str, pixels: Tensor) -> Images:
        if output_type == "pt":
            return pixels
        if output_type == "np":
            return pixels.permute(0, 2, 3, 1).numpy()
        return to_pil(to_uint8(pixels))

    def set_progress_bar_config(self, **config: Any) -> None:
        """Set arguments of tqdm, such as `disable=True`."""
        self._progress_bar_config = config

    # -- devices --------------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move both models to a device and a dtype; return this pipeline."""
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
        """Write model_index.json, tokenizer/, prior/ and README.md, the model card.

        An earlier pipeline in the folder is replaced. Other files stay, and so does the user's own text in the model card.

        Args:
            metrics: metrics to list in the model card.
            samples: grid of samples to show in the model card.
            repo_id: Hub repository that the example code in the model card loads.

        Raises:
            UserError: if a file with one of these names exists and no pipeline wrote it.
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
        """Load a pipeline from a pipeline folder, a run folder or a Hub repository.

        Args:
            device_map: "auto" for the device that Accelerate selects, a device such as "cuda:0", or a device for each part,
                such as {"tokenizer": "cpu", "prior": "cuda:0"}.

        Raises:
            UserError: if a file is missing, is incomplete, or does not match the other files.
        """
        folder = local_folder(source, INDEX, "pipeline", revision=revision, token=token, cache_dir=cache_dir)
        pipeline = cls(*load_parts(folder, dtype))
        if device_map is not None:
            devices = device_map if isinstance(device_map, dict) else dict.fromkeys(PARTS, device_map)
            for name, device in devices.items():
                if name not in PARTS:
                    raise UserError(f"device_map names {name!r}; expected 'tokenizer' or 'prior'")
                getattr(pipeline, name).to(accelerated_device() if device == "auto" else device)
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
        """Upload the pipeline to a Hub repository, creating it if needed; return the URL of the commit."""
        repo_id = create_repository(repo_id, private=private, token=token)
        with TemporaryDirectory() as temporary:
            folder = Path(temporary) / "pipeline"
            fetch_card(repo_id, folder, token=token)
            self.save_pretrained(folder, metrics=metrics, samples=samples, repo_id=repo_id)
            return upload_folder(folder, repo_id, token=token, commit_message=commit_message)


def match_labels_and_images(labels: Tensor, edit: Edit) -> tuple[Tensor, Edit]:
    """Repeat a single label for all images, or a single image for all labels."""
    if len(labels) == 1:
        return labels.expand(len(edit.originals)), edit
    if len(edit.originals) == 1:
        return labels, edit.repeat(len(labels))
    raise UserError(
        f"{len(edit.originals)} images were given for {len(labels)} class labels; expected one image, or one image for each "
        "label"
    )


def image_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> Sequence[torch.Generator]:
    """Return one generator for each image.

    A sequence of generators is returned as it is. A single generator yields the seeds of `count` new generators.
    """
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if isinstance(generator, torch.Generator):
        seeds = torch.randint(2**63 - 1, (count,), generator=generator, device=generator.device)
        return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    if len(generator) != count:
        raise UserError(
            f"{len(generator)} generators were given for {count} images; expected one generator, or one for each image"
        )
    return generator


def to_uint8(pixels: Tensor) -> Tensor:
    """Convert floats in [0, 1] to rounded integers in 0 … 255."""
    return (pixels * 255).round().to(torch.uint8)
