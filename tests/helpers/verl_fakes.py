"""Stand-ins for verl's LLM server and reward workers, in a module that Ray's processes can import."""


class FakeServer:
    """Answers every request with the same tokens."""

    async def generate(self, request_id, *, prompt_ids, sampling_params, **_):
        from verl.workers.rollout.replica import TokenOutput

        return TokenOutput(token_ids=[5, 6, 7], log_probs=[-0.5, -0.5, -0.5])


class FakeRewards:
    """A reward worker whose reward depends on the prompt: every second rollout of "fair" succeeds, and "broken" raises."""

    def __init__(self):
        self.seen = 0

    async def compute_score(self, data):
        prompt = data.non_tensor_batch["raw_prompt"][0][0]["content"]
        if prompt == "broken":
            raise RuntimeError("the verifier is down")
        self.seen += prompt == "fair"
        reward = {"sure": 1.0, "hopeless": -1.0, "fair": 2.0 * (self.seen % 2) - 1.0}[prompt]
        return {"reward_score": reward, "reward_extra_info": {"acc": reward}}
