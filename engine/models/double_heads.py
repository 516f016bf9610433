"""GPT with two heads: the next token of the true reply, and which of several replies was given.

A token's embedding has that of its speaker added. A reply's score is read off its last token (hidden → dropout →
linear to one); the language-model head, tied to the embedding, reads the true reply alone, so that no other logits
exist. (TransferTransfo: Wolf et al. 2019, arXiv:1901.08149.) What rows are is in engine/data/dialogue_tokens.py.
"""

import torch
import torch.nn as nn

from engine.data.choices import lines_of
from engine.data.dialogue_tokens import SPECIALS, special_ids
from engine.models.gpt import GPT, Layout
from engine.objectives import ReplyAndChoice

TASK = "engine.tasks.dialogues"


class DoubleHeads(GPT):
    """Token ids and types (B, 2, lines, R) of a context and its candidates → scores (B, candidates), or with targets
    (B, 1 + R) the parts of the loss (3,); and the output RMS of the blocks in `norm_layers`.

    Inputs and targets are those of engine.data.choices. `loss` is a module (hidden (B, R, C), head_weight, scores,
    targets, gradient_scale) → (3,).
    """

    def __init__(self, s, vocabulary_size: int, norm_layers: tuple[int, ...] = ()):
        super().__init__(s, vocabulary_size, norm_layers)
        self.ids, self.shared_context = special_ids(vocabulary_size), s.shared_context
        self.loss = ReplyAndChoice(vocabulary_size)

    def add_heads(self, s) -> None:
        self.choice_dropout, self.choice_head = nn.Dropout(s.dropout), nn.Linear(s.width, 1)

    def embedded(self, tokens: torch.Tensor, layout: Layout | None) -> torch.Tensor:
        """(B, T) → (B, T, C): of the token and of its speaker. Padding has no speaker, and is seen by none.

        A speaker's embedding is chosen, not looked up: a whole batch's gradients, added to two rows of the table one
        by one, would wait for each other. For the same reason padding looks up rows all over it.
        """
        own = torch.arange(tokens.numel(), device=tokens.device).view_as(tokens) % self.vocabulary_size
        x = self.token_embedding(torch.where(tokens == self.ids["pad"], own, tokens))
        for speaker in ("speaker1", "speaker2"):
            row = self.token_embedding.weight[self.ids[speaker]]
            x = x + (layout.types == self.ids[speaker])[..., None] * row
        return x

    def forward(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor | None = None,
        gradient_scale: torch.Tensor | None = None,
    ):
        """gradient_scale, (3,) or a scalar: multiplies gradients, not losses; then call backward() on their sum."""
        read = self._shared if self.shared_context else self._apart
        reply, norms = read(*self._parts(inputs))
        last = (inputs[:, 0, -reply.size(1) :] != self.ids["pad"]).sum(-1) - 1  # (B, candidates)
        end = reply.gather(2, last[..., None, None].expand(-1, -1, 1, reply.size(-1))).squeeze(2)
        scores = self.choice_head(self.choice_dropout(end)).squeeze(-1)  # (B, candidates)
        if targets is None:
            return scores, norms
        true = targets[:, 0].clamp(min=0)[:, None, None, None].expand(-1, 1, *reply.shape[2:])
        hidden = reply.gather(1, true).squeeze(1)  # (B, R, C)
        return self.loss(hidden, self.head_weight, scores, targets, gradient_scale), norms

    def _parts(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(context (B, 2, S), candidates (B, 2, candidates, R)) of inputs, S + R being the model's context."""
        room = self.context - inputs.size(-1)
        lines = lines_of(room, inputs.size(-1))
        return inputs[:, :, :lines].flatten(2)[..., :room], inputs[:, :, lines:]

    def _apart(self, context: torch.Tensor, replies: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Each candidate behind a context of its own: what the heads read of it (B, candidates, R, C), and norms."""
        count, room, width = replies.size(2), context.size(2), replies.size(3)
        before = (context[:, 0] != self.ids["pad"]).sum(-1)[:, None, None]  # (B, 1, 1) tokens
        place = torch.arange(room + width, device=context.device)
        # Token p of a sequence is the context's, or behind it the reply's.
        source = torch.where(place < before, place, (place - before).clamp(max=width - 1) + room)
        both = torch.cat([context[:, :, None].expand(-1, -1, count, -1), replies], 3)  # (B, 2, candidates, T)
        found = both.gather(3, source[:, None].expand_as(both))
        found = torch.where(place < before[:, None] + width, found, self.ids["pad"])
        tokens, types = found.transpose(0, 1).flatten(1, 2)  # (B · candidates, T) each
        hidden, norms = self.features(tokens, None, Layout(types=types))
        hidden = hidden.unflatten(0, (-1, count))
        of_reply = before + torch.arange(width, device=context.device)  # (B, 1, R)
        index = of_reply[..., None].expand(-1, count, -1, hidden.size(-1))
        return hidden.gather(2, index), norms

    def _shared(
        self, context: torch.Tensor, replies: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The same with all candidates behind one context, in one sequence, none seeing another."""
        count, room, width = replies.size(2), context.size(2), replies.size(3)
        tokens, types = torch.cat([context, replies.flatten(2)], 2).unbind(1)  # (B, S + candidates · R) each
        before = (context[:, 0] != self.ids["pad"]).sum(-1, keepdim=True)  # (B, 1) tokens
        place = torch.arange(tokens.size(1), device=tokens.device)
        group = torch.where(place < room, 0, 1 + (place - room) // width)  # 0: the context
        positions = torch.where(group == 0, place, before + (place - room) % width)
        same = (group[:, None] == group) & (place[:, None] >= place)
        mask = same | ((group == 0) & (place < before))[:, None, :] & (group > 0)[:, None]  # (B, T, T)
        layout = Layout(types, positions, mask[:, None])
        hidden, norms = self.features(tokens, None, layout)
        return hidden[:, room:].unflatten(1, (count, width)), norms


def build(settings, vocabulary_size: int, norm_layers: tuple[int, ...] = (), classes: int = 0) -> DoubleHeads:
    """A model with weights drawn from torch's global generator: seed it first. It has no classes."""
    return DoubleHeads(settings, vocabulary_size, norm_layers)


def completed(
    model: DoubleHeads, found: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights `found` of a GPT with what it has not, as drawn, and without positions that no row reaches; and in
    words what was done. Vocabulary rows of `found` are without padding."""
    own, words = dict(model.named_parameters()), []
    found = dict(found)
    if "choice_head.weight" not in found:
        words.append(f"{', '.join(SPECIALS)} and the choice head drawn")
        found |= {name: own[name].detach() for name in own if name.startswith("choice_head.")}
        for name in ("token_embedding.weight", "head.weight"):
            if name in found and name in own and len(found[name]) == model.vocabulary_size - len(SPECIALS):
                specials = own[name][model.vocabulary_size - len(SPECIALS) : model.vocabulary_size].detach()
                found[name] = torch.cat([found[name], specials])
    places = found.get("position_embedding.weight")
    if places is not None and len(places) > model.context:
        words.append(f"positions from {model.context} of {len(places)} left out")
        found["position_embedding.weight"] = places[: model.context]
    return found, words
