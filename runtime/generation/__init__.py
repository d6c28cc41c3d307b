"""One answer or a batch of them: the loop, choosing the next token, rules about logits."""
