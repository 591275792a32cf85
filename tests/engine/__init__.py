"""Real engines and servers, in processes of their own, and what is compared through them."""
