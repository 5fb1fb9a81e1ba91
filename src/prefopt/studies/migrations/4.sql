-- Annotators that an item of its own number shall get; null: as the setting says.
ALTER TABLE queue ADD COLUMN overlap INTEGER
