"""What a finished rollout is worth: rewards and labels, advantages in its group, scores of an evaluation."""
