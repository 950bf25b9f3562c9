import os

# Nothing that a test starts may look for a network or an account.
os.environ["WANDB_MODE"] = "disabled"
