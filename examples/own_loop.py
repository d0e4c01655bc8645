"""The op in a training loop of your own: a softmax policy learns the answers to 32 prompts within a second on a CPU.

python examples/own_loop.py
"""

import torch

from v05.ops import fused_advantage

PROMPTS, ANSWERS, ROLLOUTS, STEPS = 32, 10, 4, 60

torch.manual_seed(0)
right = torch.randint(ANSWERS, (PROMPTS,))
logits = torch.zeros(PROMPTS, ANSWERS, requires_grad=True)  # the policy
optimizer = torch.optim.Adam([logits], lr=0.1)
prior = torch.full((PROMPTS,), 1 / ANSWERS)  # predicted success rate of each prompt
offsets = torch.arange(PROMPTS + 1) * ROLLOUTS  # prompt g has the rows offsets[g] to offsets[g + 1] - 1

for step in range(STEPS):
    policy = torch.distributions.Categorical(logits=logits.repeat_interleave(ROLLOUTS, 0))
    answers = policy.sample()  # (N,), N = PROMPTS x ROLLOUTS
    rewards = (answers == right.repeat_interleave(ROLLOUTS)).float()
    out = fused_advantage(rewards, prior, group_offsets=offsets, method="v05")
    loss = -(out.advantages * policy.log_prob(answers)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    prior = 0.8 * prior + 0.2 * out.stats.mean  # learns from the step's rollouts
    if step % 15 == 14:
        weight = out.stats.weight.mean()  # weight of the group's mean in the baseline; the rest is the weight of the prior
        print(f"step {step + 1}: success rate {rewards.mean():.2f}, weight of the mean {weight:.2f}")
