"""One model on several processes: how they were launched, and how its parts are shared out and put together again."""
