"""What a request must be for this worker's model, checked before the rank hears of it."""

from __future__ import annotations

from tandem.core.messages.requests import Submit
from tandem.core.messages.worker import RankReady
from tandem.core.token_ids import BYTES_PER_TOKEN, unpack
from tandem.errors import InvalidRequest, NotFound, Unavailable
from tandem.rpc.sampling_rules import check_sampling, check_token_ids


def check_submit(submit: Submit, ready: RankReady) -> None:
    """Raise InvalidRequest for lengths and token ids that the model cannot take, and for adapters that are not here."""
    _check_adapter(submit, ready)
    num_prompt = len(submit.prompt_token_ids) // BYTES_PER_TOKEN
    if num_prompt > ready.max_req_input_len:
        raise InvalidRequest(
            f"the prompt has {num_prompt} tokens, this worker takes {ready.max_req_input_len}", field="prompt"
        )
    num_output = len(submit.output_token_ids) // BYTES_PER_TOKEN
    if num_prompt + num_output > ready.max_context_tokens:
        raise InvalidRequest(
            f"prompt and output have {num_prompt + num_output} tokens, the context has {ready.max_context_tokens}",
            field="output_token_ids",
        )
    check_token_ids(unpack(submit.prompt_token_ids), ready.vocab_size, "prompt")
    check_token_ids(unpack(submit.output_token_ids), ready.vocab_size, "output_token_ids")
    check_sampling(submit.sampling, vocab_size=ready.vocab_size)


def _check_adapter(submit: Submit, ready: RankReady) -> None:
    """A gateway that means certain weights may find them at another worker; everybody else has made a mistake."""
    if not submit.adapter:
        return
    own = {adapter.name: adapter.digest for adapter in ready.adapters}
    if submit.adapter_digest and own.get(submit.adapter) != submit.adapter_digest:
        raise Unavailable(f"adapter {submit.adapter!r} is not here as the gateway knows it")
    if submit.adapter not in own:
        served = ", ".join(sorted(own)) or "none"
        raise NotFound(f"adapter {submit.adapter!r} is not served here; served: {served}", field="lora_adapter")
