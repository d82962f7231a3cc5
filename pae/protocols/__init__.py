"""The protocols that prompt tuning is compared by: VTAB-1k, FGVC, few-shot; their tasks as data."""
