"""Layers that diffusers builds alike in many models: rules for their names, and how they are cut."""

from __future__ import annotations

from ..spec import Cut, Rule

FINAL_LAYER = (
    Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),  # shift, scale -> scale, shift
    Rule("final_layer.linear", ("proj_out",)),
)


def embedder(source: str, target: str, layers: tuple[str, str] = ("0", "2")) -> tuple[Rule, Rule]:
    """Rules for two linear layers, such as those that embed the time; `layers`: what the original calls them."""
    first, second = layers
    return Rule(f"{source}.{first}", (f"{target}.linear_1",)), Rule(f"{source}.{second}", (f"{target}.linear_2",))


def feed_forward(source: str, target: str, layers: tuple[str, str] = ("0", "2")) -> tuple[Rule, Rule]:
    """Rules for the two layers of a feed-forward; `layers`: what the original calls them."""
    first, second = layers
    return Rule(f"{source}.{first}", (f"{target}.net.0.proj",)), Rule(f"{source}.{second}", (f"{target}.net.2",))


def projections(attention: str, parts: str = "qkv") -> tuple[str, ...]:
    """The layers of an attention that make queries, keys and values (`parts`)."""
    return tuple(f"{attention}.to_{part}" for part in parts)


def text_projections(attention: str) -> tuple[str, ...]:
    """The layers of a joint attention that make the text's queries, keys and values."""
    return tuple(f"{attention}.add_{part}_proj" for part in "qkv")


def attention_cuts(attention: str) -> tuple[Cut, Cut]:
    """Every rank has some heads of the attentions whose names match, of their layers for text, too."""
    return (
        Cut(rf"{attention}\.(to_[qkv]|add_[qkv]_proj)", "column", ("heads",)),
        Cut(rf"{attention}\.(to_out\.0|to_add_out)", "row", ("heads",)),
    )


def feed_forward_cuts(feed_forward: str) -> tuple[Cut, Cut]:
    """Every rank has some features of the feed-forwards whose names match."""
    return Cut(rf"{feed_forward}\.net\.0\.proj", "column"), Cut(rf"{feed_forward}\.net\.2", "row")
