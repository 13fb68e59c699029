"""What both LightningModules share: model, optimizers, the manual step, sharding, saved weights, evaluation steps."""
