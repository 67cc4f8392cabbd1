"""Checks that exact mode can train a network: by what it registers and by throwaway passes that leave it unchanged."""
