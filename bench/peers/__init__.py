"""GRPO's advantages as other libraries compute them: one file a peer, which calls it as shipped or says what it writes out."""
