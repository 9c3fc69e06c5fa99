"""lm-eval's model class over this program's models, for every task that lm-eval has.

This module imports lm-eval and with it transformers; import it only where the harness is wanted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from qmamba_cli.evaluation.scoring import MAX_LENGTH, LanguageModel, ScoreRequest, score_requests
from qmamba_cli.tokenizer import Tokenizer


class _Shell:
    """What lm-eval's class asks of a model object that it did not make itself.

    Attributes:
        device: where inputs go; scoring moves them on itself.
        config: an empty configuration, from which lm-eval's class reads optional fields.
        name_or_path: the model as named.
    """

    def __init__(self, name: str) -> None:
        from transformers import PretrainedConfig

        self.device = torch.device("cpu")
        self.config = PretrainedConfig()
        self.name_or_path = name


class HarnessModel(HFLM):  # type: ignore[misc] # lm-eval ships no types.
    """A model of this program as an lm-eval model.

    Requests are encoded, ordered, batched and joined as in `lm_eval.models.huggingface.HFLM`, which this
    derives from. Log-likelihoods come from `scoring.score_requests`, the built-in scorer, so that a task
    gives the same digits either way, and the head never runs on positions that no one asked for.

    Args:
        model: scores, and generates through ``continue_prompt``.
        tokenizer: its tokenizer.
        name: for lm-eval's results.
        info: for lm-eval's results, in place of what it would ask the Hub.
        batch_size: sequences a forward pass.
        max_length: longest input in tokens.

    Source: EleutherAI/lm-evaluation-harness 0.4.13, ``lm_eval/models/huggingface.py``; we generate one
    sequence at a time, since left padding would enter the state of a recurrent model.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        name: str,
        info: Mapping[str, Any],
        continue_prompt: Any,
        batch_size: int = 1,
        max_length: int = MAX_LENGTH,
    ) -> None:
        super().__init__(
            pretrained=_Shell(name),
            backend="causal",
            tokenizer=tokenizer.to_transformers(),
            max_length=max_length,
            batch_size=batch_size,
        )
        self._language_model = model
        self._info = dict(info)
        self._continue_prompt = continue_prompt

    def get_model_info(self) -> dict[str, Any]:
        """Provenance for lm-eval's results."""
        return self._info

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,  # noqa: ARG002 (lm-eval's signature)
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        scores = score_requests(
            self._language_model,
            [
                ScoreRequest((*context, *continuation), len(continuation))
                for _, context, continuation in requests
            ],
            batch_size=override_bs or self.batch_size,
            max_length=self.max_length,
        )
        for (key, _, _), score in zip(requests, scores, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, score)
        return scores

    def _model_generate(
        self,
        context: torch.Tensor,
        max_length: int,
        stop: Sequence[str],
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        rows = []
        for row, ids in enumerate(context):
            prompt = ids if attention_mask is None else ids[attention_mask[row].bool()]
            made: list[int] = []
            for token in self._continue_prompt(
                prompt.tolist(),
                max_new_tokens=max_length - context.shape[1],
                temperature=float(options.get("temperature") or 0.0),
            ):
                made.append(token)
                text = self.tok_decode(made)
                if any(word and word in text for word in stop):
                    break
            rows.append(torch.cat([ids, torch.tensor(made, dtype=ids.dtype)]))
        return torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0
        )
