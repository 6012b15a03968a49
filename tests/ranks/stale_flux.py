"""Runs of a tiny Flux, for tests of approximate methods, and a serial model of stale keys and values written out."""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from paralleldit.parallel_backend.distributed.control_group import ControlGroup
from paralleldit.parallel_backend.distributed.mesh import Mesh
from paralleldit.parallel_backend.engine import sample
from paralleldit.parallel_backend.families.family import TokenFamily
from paralleldit.parallel_backend.protocol import messages
from paralleldit.parallel_backend.run_context import Run
from paralleldit.tests.tiny_models import GUIDANCE, TINY_MODELS

CFG = 3.0
HEADS, HEAD_DIM, TEXT = 4, 16, 5
WIDTH = HEADS * HEAD_DIM


def make_family() -> TokenFamily:
    return TINY_MODELS["flux dev"].make_family(HEADS)


def request_of(layout, steps, size, sampler, *, preview=False):
    """A guided batch of two, with a negative prompt of another length, and a mask for the samplers that hold."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    request = messages.Sample(
        id=1,
        model=messages.ModelRef(path="unused"),
        layout=layout,
        positive=(messages.Conditioning(guidance=GUIDANCE),),
        negative=(messages.Conditioning(guidance=GUIDANCE),),
        cfg=CFG,
        sampler=sampler,
        schedule=messages.Schedule(scheduler="simple", steps=steps, denoise=0.8),
        seed=42,
        preview=preview,
    )
    tensors = {
        "latent": draw(2, 16, *size),
        "positive.0.tokens": draw(1, TEXT, 24),
        "positive.0.pooled": draw(1, 12),
        "negative.0.tokens": draw(2, TEXT + 3, 24),
        "negative.0.pooled": draw(2, 12),
    }
    if sampler in ("euler", "ddim"):
        tensors["noise_mask"] = torch.linspace(0, 1, 2 * size[0] * size[1]).view(2, 1, *size).round()
    return request, tensors


def run_of(request, *, cancel_at=None):
    """A run of the real control group, and the events that rank 0 sends. It is cancelled at a step's progress."""
    events = []

    def is_cancelled():
        return any(isinstance(event, messages.Progress) and event.step == cancel_at for event, _ in events)

    return Run(ControlGroup(), request.id, lambda *event: events.append(event), is_cancelled), events


def sampled(world, layout, steps, size, sampler):
    request, tensors = request_of(layout, steps, size, sampler)
    return sample.sample(request, tensors, make_family(), Mesh(layout), run_of(request)[0])["latent"]


class StaleModel:
    """A serial Flux in which tokens that are not at hand are seen by the keys and values of their last time.

    Tokens without any yet are not seen at all.
    """

    patches = warmup_evaluations = 0

    def __init__(self, *of_a_strategy):
        # A model of its own: the family's layers have sites that go by the strategy.
        self.model = TINY_MODELS["flux dev"].make(HEADS)
        self.layers = [*self.model.transformer_blocks, *self.model.single_transformer_blocks]
        self.seen = {}
        self.kept = {}

    def outputs_of(self, latent, condition):
        """As many as keep prompts apart: PipeFusion evaluates one by one."""
        return 10**12

    def predict(self, latent, timestep, condition, next_timestep=None):
        model, length = self.model, condition["tokens"].shape[1]
        batch, channels, height, width = latent.shape
        rows, columns = -(-height // 2), -(-width // 2)
        padded = F.pad(latent, (0, width % 2, 0, height % 2), mode="circular")
        tokens = padded.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        tokens = tokens.reshape(batch, rows * columns, channels * 4)
        ids = torch.zeros(length + rows * columns, 3)
        ids[length:, 1] = torch.arange(rows).repeat_interleave(columns)
        ids[length:, 2] = torch.arange(columns).repeat(rows)
        rotary = model.pos_embed(ids)
        strength = torch.full((batch,), GUIDANCE * 1000)
        modulation = model.time_text_embed(timestep * 1000, strength, condition["pooled"].expand(batch, -1))

        evaluation = self.seen[length] = self.seen.get(length, -1) + 1
        output = torch.zeros_like(tokens)
        for turn, (text_at, at) in enumerate(self.turns(evaluation, length, rows, columns)):
            writes = []
            places = torch.cat((text_at, length + at))
            image = model.x_embedder(tokens[:, at])
            text = model.context_embedder(condition["tokens"][:, text_at].expand(batch, -1, -1))
            for number, layer in enumerate(self.layers):
                shape = (batch, len(ids), HEADS, HEAD_DIM)
                kept = self.kept.setdefault((length, number), torch.full((2, *shape), torch.nan))
                layer.attn.set_processor(StaleSite(kept, places, writes))
                text, image = layer(
                    hidden_states=image,
                    encoder_hidden_states=text,
                    temb=modulation,
                    image_rotary_emb=tuple(table[places] for table in rotary),
                )
            output[:, at] = model.proj_out(model.norm_out(image, modulation))
            self.keep(evaluation, turn, writes)
        self.end_evaluation()
        whole = output.view(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return whole.reshape(batch, channels, rows * 2, columns * 2)[..., :height, :width]

    def begin_step(self, step):
        pass

    def finish(self):
        pass

    forget = finish

    def turns(self, evaluation, length, rows, columns):
        """The text and image tokens that are computed at once, one turn after the other."""
        strips = [part.tolist() for part in torch.arange(rows).tensor_split(self.patches)]
        for strip in [list(range(rows))] if evaluation < self.warmup_evaluations else strips:
            at = [row * columns + column for row in strip for column in range(columns)]
            yield torch.arange(length if 0 in strip else 0), torch.tensor(at)

    def keep(self, evaluation, turn, writes):
        """What is seen from now on of the keys and values that were computed in this turn."""
        for kept, places, fresh in writes:
            kept[:, :, places] = fresh

    def end_evaluation(self):
        pass


class StaleSite:
    def __init__(self, kept, places, writes):
        self.kept, self.places, self.writes = kept, places, writes

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        split = lambda x: x.unflatten(-1, (HEADS, HEAD_DIM))  # noqa: E731
        query = attn.norm_q(split(attn.to_q(hidden_states)))
        key = attn.norm_k(split(attn.to_k(hidden_states)))
        value = split(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            query = torch.cat((attn.norm_added_q(split(attn.add_q_proj(encoder_hidden_states))), query), dim=1)
            key = torch.cat((attn.norm_added_k(split(attn.add_k_proj(encoder_hidden_states))), key), dim=1)
            value = torch.cat((split(attn.add_v_proj(encoder_hidden_states)), value), dim=1)
        query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        fresh = torch.stack((key, value))
        self.writes.append((self.kept, self.places, fresh))
        seen = self.kept.clone()
        seen[:, :, self.places] = fresh
        seen = seen[:, :, ~seen[0, 0, :, 0, 0].isnan()]
        heads = [x.transpose(1, 2) for x in (query, *seen)]
        out = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        length = encoder_hidden_states.shape[1]
        return attn.to_out[0](out[:, length:]), attn.to_add_out(out[:, :length])


def relative_error(actual, expected) -> float:
    return float((actual - expected).norm() / expected.norm())
