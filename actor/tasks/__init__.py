"""Tasks: where prompts come from and how completions are rewarded."""
