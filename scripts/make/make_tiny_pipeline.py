"""Trains the tiny pipeline of tests/data: a FLUX.1 of diffusers that draws coloured digits.

`make tiny-pipeline` runs it: ten minutes on two cores, less than two on a GPU (`--device cuda`). It writes a whole
pipeline folder, so that what runs real pipelines runs this one by the same path: `a red seven` goes through two
tokenizers and two text encoders, which are not trained and only tell prompts apart. The autoencoder is trained first,
the transformer then by flow matching. Images are the 8x8 digits of scikit-learn, enlarged to 32x32 and coloured.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits

COLOURS = {
    "red": (1.0, 0.2, 0.15),
    "green": (0.2, 0.9, 0.3),
    "blue": (0.25, 0.45, 1.0),
    "yellow": (1.0, 0.85, 0.1),
    "pink": (1.0, 0.45, 0.8),
    "white": (1.0, 1.0, 1.0),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = [f"a {colour} {digit}" for digit in DIGITS for colour in COLOURS]  # of an image's number, see Images
SIZE = 32  # of an image's side, in pixels
TOKENS = 16  # of a prompt, padded
GUIDANCE = 3.5  # the default of the pipeline, the only one that the transformer sees
CHANNELS = 16  # of a latent pixel, as FLUX.1 has; the transformer sees four of them as one token


class Images:
    """Draws images, (n, 3, SIZE, SIZE) in -1..1, and the numbers of their prompts."""

    def __init__(self, device: torch.device) -> None:
        digits = load_digits()
        grey = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        self._grey = torch.nn.functional.interpolate(grey, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1).to(device)
        self._digit = torch.tensor(digits.target, device=device)
        self._colours = torch.tensor(list(COLOURS.values()), device=device)
        self.generator = torch.Generator(device).manual_seed(1)

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, colour = self._any(len(self._grey), count), self._any(len(self._colours), count)
        pixels = self._grey[image] * self._colours[colour][:, :, None, None]
        return pixels * 2 - 1, self._digit[image] * len(self._colours) + colour

    def _any(self, below: int, count: int) -> torch.Tensor:
        return torch.randint(below, (count,), generator=self.generator, device=self._grey.device)


def cosine_steps(optimizer: torch.optim.Optimizer, steps: int, rate: float, warm_up: int) -> Iterator[int]:
    """The numbers of the steps; the learning rate rises over the first and falls to zero until the last."""
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
        yield step


def train_autoencoder(images: Images, device: torch.device, steps: int) -> Any:
    """An AutoencoderKL that halves the sides of an image, its latents scaled to a standard deviation of 1."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in cosine_steps(optimizer, steps, rate=3e-3, warm_up=1):
        pixels, _ = images.draw(32)
        posterior = model.encode(pixels).latent_dist
        latents = posterior.sample(images.generator)
        loss = (
            torch.nn.functional.mse_loss(model.decode(latents).sample, pixels)
            + 1e-4 * posterior.kl().mean() / latents[0].numel()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        told("autoencoder", step, steps, loss)
    with torch.no_grad():
        latents = model.encode(images.draw(512)[0]).latent_dist.sample(images.generator)
    model.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )
    return model


def clip() -> tuple[Any, Any]:
    """A tokenizer with a token a word, and a text model with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    pieces: list[str] = []
    merges: list[tuple[str, str]] = []
    for word in ("a", *COLOURS, *DIGITS):
        joined, *rest = [*word[:-1], f"{word[-1]}</w>"]
        pieces += [joined, *rest]
        for piece in rest:
            merges.append((joined, piece))
            joined += piece
            pieces.append(joined)
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", END]))}
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=list(dict.fromkeys(merges)), unk_token=END, model_max_length=TOKENS
    )
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=32,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
    )
    return tokenizer, CLIPTextModel(config).eval()


END = "<|endoftext|>"


def t5() -> tuple[Any, Any]:
    """A tokenizer with a token a word, and an encoder with random weights."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [*special, *((f"\u2581{word}", -1.0) for word in ("a", *COLOURS, *DIGITS))]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TOKENS)
    config = T5Config(
        vocab_size=len(pieces),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return tokenizer, T5EncoderModel(config).eval()


def new_pipeline(autoencoder: Any, device: torch.device) -> Any:
    """A FluxPipeline around the autoencoder; its transformer has FLUX.1-dev's structure and random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer, text_encoder = clip()
    tokenizer_2, text_encoder_2 = t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    ).to(device)


def train_transformer(pipeline: Any, images: Images, device: torch.device, steps: int, batch: int) -> None:
    """Flow matching: from latents mixed with noise, and their prompts, the transformer tells noise less latents.

    What stays is the moving average of the weights.
    """
    transformer, autoencoder = pipeline.transformer, pipeline.vae
    with torch.no_grad():
        words, pooled, text_ids = pipeline.encode_prompt(PROMPTS, PROMPTS, device=device, max_sequence_length=TOKENS)
    image_ids = pipeline._prepare_latent_image_ids(1, SIZE // 4, SIZE // 4, device, torch.float32)
    average = {name: tensor.detach().clone() for name, tensor in transformer.state_dict().items()}
    optimizer = torch.optim.AdamW(transformer.parameters(), betas=(0.9, 0.98))
    for step in cosine_steps(optimizer, steps, rate=2e-3, warm_up=100):
        pixels, prompt = images.draw(batch)
        with torch.no_grad():
            latents = autoencoder.encode(pixels).latent_dist.sample(images.generator)
            latents = (latents - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor
            latents = pipeline._pack_latents(latents, batch, CHANNELS, SIZE // 2, SIZE // 2)
        noise = torch.randn(latents.shape, generator=images.generator, device=device)
        share = torch.sigmoid(torch.randn(batch, generator=images.generator, device=device))
        velocity = transformer(
            hidden_states=torch.lerp(latents, noise, share[:, None, None]),
            timestep=share,
            guidance=torch.full((batch,), GUIDANCE, device=device),
            pooled_projections=pooled[prompt],
            encoder_hidden_states=words[prompt],
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        loss = torch.nn.functional.mse_loss(velocity, noise - latents)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        kept = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, tensor in transformer.state_dict().items():
                average[name].lerp_(tensor, 1 - kept)
        told("transformer", step, steps, loss)
    transformer.load_state_dict(average)


def told(what: str, step: int, steps: int, loss: torch.Tensor) -> None:
    if step % 100 == 0 or step == steps - 1:
        print(f"{what}: step {step + 1} of {steps}, loss {loss.item():.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--autoencoder-steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    images = Images(chosen.device)
    pipeline = new_pipeline(train_autoencoder(images, chosen.device, chosen.autoencoder_steps), chosen.device)
    train_transformer(pipeline, images, chosen.device, chosen.steps, chosen.batch)
    pipeline.to(torch.bfloat16).save_pretrained(chosen.folder)


if __name__ == "__main__":
    main()
