"""The results tables: their columns, writing, reading, which rows count, compaction."""
