"""GRPO's advantages as other libraries compute them. Each peer's file calls the library unchanged or copies its arithmetic."""
