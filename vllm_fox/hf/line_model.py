"""What models whose tokens form one line have in common: the arguments of ``forward``, layouts and losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .inputs import tokens_of, wants_hidden_states
from .line import NO_LABEL, Line
from .loss import logits_and_loss


class LineModelMixin:
    """A model of embeddings, ``layers`` and a final ``norm``, between which all tokens of a batch form one line.

    A layer is called as ``layer(x, line, context)`` with x [N, hidden] and what :meth:`context` returns.
    """

    if TYPE_CHECKING:
        config: Any
        layers: nn.ModuleList
        norm: nn.Module

        def get_input_embeddings(self) -> nn.Module: ...

    # What a family may define.

    def past_of(self, cache: object, batch: int) -> dict[str, Any]:
        """Return what :meth:`.Line.of` needs to know of earlier calls, given the cache that they filled, if any."""
        if cache is not None:
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}: leave it out, because only a server has a cache."
            )
        return {}

    def cache_for(self, line: Line, use_cache: bool | None) -> Any:
        """Return a new cache if there is to be one."""
        if use_cache:
            raise ValueError("use_cache is true: leave it out, because only a server has a cache.")
        return None

    def context(self, x: torch.Tensor, line: Line, cache: Any) -> Any:
        """Return what all layers get besides the line, given the embeddings of tokens x [N, hidden]."""
        return cache

    def embedded(self, x: torch.Tensor, line: Line) -> torch.Tensor:
        """Map embeddings of tokens [N, hidden] to what the first layer reads [N, hidden]."""
        return x

    def run_layer(self, layer: nn.Module, x: torch.Tensor, line: Line, context: Any) -> tuple[torch.Tensor, Any]:
        """Map x [N, hidden] to the layer's output [N, hidden], and to what it has to say besides."""
        return layer(x, line, context), None

    def output(self, hidden: Any, cache: Any, states: tuple[Any, ...] | None, said: list[Any]) -> Any:
        """Return the output of :meth:`forward`, given all that layers have said besides."""
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache, hidden_states=states)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache_position: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: torch.Tensor | None = None,
        line: Line | None = None,
    ) -> Any:
        """Compute the hidden states of the last layer.

        What is said of :meth:`.Line.of` holds for the layout's arguments. ``return_dict=False`` gives a tuple.

        Args:
            input_ids: [B, T]; give either these or ``inputs_embeds`` [B, T, hidden].
            attention_mask: [B, T] (with a cache, T includes the cached tokens), 0 at padding, which may be
                anywhere. The hidden states of padding are those of the token before it, or 0 if there is none.
            position_ids: [B, T] number of each token in its sequence. Where it is 0 a sequence begins, and no
                attention crosses such a border.
            past_key_values: cache that an earlier call returned, if the model has caches.
            use_cache: whether to make a cache. If this is None, the config says so, but there is none in training
                and for packed sequences.
            output_attentions: only False is supported.
            output_hidden_states: whether to return the hidden states before each layer as well, and those returned.
            cu_seqlens: [S + 1] bounds of sequences packed into one row (B = 1). FlashAttention's ``cu_seq_lens_q``
                and ``cu_seq_lens_k`` with ``max_length_q`` and ``max_length_k``, and ``seq_idx`` [1, T], say the
                same.
            line: the layout that all these describe, if the caller has made it.

        Raises:
            ValueError: an argument is none of this, or contradicts another; the message names it.
        """
        tokens = tokens_of(input_ids, inputs_embeds)
        keep_states = wants_hidden_states(self.config, output_hidden_states, output_attentions)
        if line is None:
            line = Line.of(
                tokens,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache_position=cache_position,
                cu_seqlens=cu_seqlens,
                cu_seq_lens_q=cu_seq_lens_q,
                cu_seq_lens_k=cu_seq_lens_k,
                max_length_q=max_length_q,
                max_length_k=max_length_k,
                seq_idx=seq_idx,
                **self.past_of(past_key_values, len(tokens)),
            )
        if past_key_values is not None and line.packed:
            raise ValueError("past_key_values is given: packed sequences cannot be continued, so leave it out.")
        cache = self.cache_for(line, use_cache) if past_key_values is None else past_key_values
        if cache is not None:
            counts = line.cu_seqlens.diff().long()
            cache.positions = counts if cache.positions is None else counts + cache.positions
        x = line.pack(self.get_input_embeddings()(tokens) if inputs_embeds is None else inputs_embeds)
        context = self.context(x, line, cache)
        x = self.embedded(x, line)
        states: list[Any] = []
        said: list[Any] = []
        for layer in self.layers:
            if keep_states:
                # The layer computes with what is returned, so that gradients reach it.
                states.append(line.unpack(x))
                x = line.pack(states[-1])
            x, besides = self.run_layer(layer, x, line, context)
            said.append(besides)
        hidden: Any = line.unpack(self.norm(x), None if cache is None else cache.newest)
        if cache is not None:
            cache.newest = hidden[:, -1].clone()
        return self.output(hidden, cache, (*states, hidden) if keep_states else None, said)


class LineForCausalLM:
    """A language model: a :class:`LineModelMixin`, which ``base_model_prefix`` names, and ``lm_head``."""

    # Trainer looks for a catch-all keyword otherwise.
    accepts_loss_kwargs = True

    if TYPE_CHECKING:
        config: Any
        base_model: Any
        lm_head: nn.Module
        loss_function: Any

    # What a family may define.

    def added_loss(self, outputs: Any) -> torch.Tensor | None:
        """Return what the loss has besides the mean of the labels' losses, given the output of the base model.

        Where the labels are a part of a batch's (``num_items_in_batch``), it counts by their share, so that the
        losses of all parts add up.
        """
        return None

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache_position: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Compute next-token logits [B, T, vocab], and the loss if there are labels.

        In training mode with labels there is the loss alone, and ``logits`` is None (:mod:`.loss` says why).

        The other arguments are as in :meth:`LineModelMixin.forward`.

        Args:
            labels: [B, T]; each is compared with the logits of the token before it in its sequence. -100 stands for
                no label, and there is none at padding and at a sequence's first token.
            logits_to_keep: number of positions at the end whose logits are computed (0: all), or an index of them.
            num_items_in_batch: what the sum of the labels' losses is divided by, instead of their number.
            shift_labels: [B, T] labels that are compared with the logits at their own place, instead of ``labels``.
        """
        tokens = tokens_of(input_ids, inputs_embeds)
        line = Line.of(
            tokens,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache_position=cache_position,
            cu_seqlens=cu_seqlens,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
            seq_idx=seq_idx,
            **self.base_model.past_of(past_key_values, len(tokens)),
        )
        if labels is not None:
            labels = line.labels(labels)
        outputs = self.base_model(
            input_ids=input_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            line=line,
        )
        logits, loss = logits_and_loss(
            self, outputs.last_hidden_state, labels, shift_labels, num_items_in_batch, logits_to_keep
        )
        if loss is not None and (added := self.added_loss(outputs)) is not None:
            if num_items_in_batch is not None:
                counted: Any = labels[:, 1:] if shift_labels is None and labels is not None else shift_labels
                added = added * (counted != NO_LABEL).sum() / num_items_in_batch
            loss = loss + added
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.hidden_states,
        )
