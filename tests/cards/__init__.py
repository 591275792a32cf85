"""Every card, without a card: what is launched there, what it takes, and which op is picked."""
