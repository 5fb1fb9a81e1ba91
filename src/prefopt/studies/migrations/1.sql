-- Items and events are appended and never changed; assignments follow from the events.
CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE sampling (id INTEGER PRIMARY KEY, settings TEXT NOT NULL UNIQUE);
CREATE TABLE item (
    id INTEGER PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE,
    prompt_key BLOB NOT NULL,
    row TEXT NOT NULL,
    count INTEGER NOT NULL,
    origins TEXT NOT NULL,
    gold TEXT,
    file TEXT NOT NULL,
    file_row INTEGER NOT NULL,
    at TEXT NOT NULL
);
CREATE INDEX item_gold ON item (id) WHERE gold IS NOT NULL;
CREATE TABLE annotator (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    pseudonym TEXT NOT NULL UNIQUE,
    lead INTEGER NOT NULL DEFAULT 0,
    at TEXT NOT NULL
);
CREATE TABLE invitation (
    digest BLOB PRIMARY KEY,
    annotator INTEGER NOT NULL REFERENCES annotator (id),
    at REAL NOT NULL,
    until REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE session (
    digest BLOB PRIMARY KEY,
    annotator INTEGER NOT NULL REFERENCES annotator (id),
    at REAL NOT NULL,
    until REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE event (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at TEXT NOT NULL,
    annotator INTEGER NOT NULL REFERENCES annotator (id),
    item INTEGER NOT NULL REFERENCES item (id),
    kind TEXT NOT NULL CHECK (kind IN ('shown', 'vote', 'skip', 'undo')),
    ticket TEXT NOT NULL,
    undoes INTEGER REFERENCES event (id),
    body TEXT NOT NULL
);
CREATE UNIQUE INDEX event_once ON event (ticket) WHERE kind IN ('vote', 'skip');
CREATE UNIQUE INDEX event_undone_once ON event (undoes) WHERE undoes IS NOT NULL;
CREATE INDEX event_of ON event (annotator, id);
CREATE TRIGGER event_stays BEFORE UPDATE ON event BEGIN SELECT RAISE(ABORT, 'events are never changed'); END;
CREATE TRIGGER event_kept BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'events are never removed'); END;
CREATE TABLE assignment (
    annotator INTEGER NOT NULL REFERENCES annotator (id),
    item INTEGER NOT NULL REFERENCES item (id),
    state TEXT NOT NULL CHECK (state IN ('pending', 'lapsed', 'voted', 'skipped')),
    ticket TEXT NOT NULL,
    shown TEXT NOT NULL,
    since REAL NOT NULL,
    until REAL NOT NULL,
    event INTEGER REFERENCES event (id),
    PRIMARY KEY (annotator, item)
) WITHOUT ROWID;
CREATE INDEX assignment_waiting ON assignment (until) WHERE state = 'pending';
CREATE INDEX assignment_open ON assignment (annotator, since) WHERE state IN ('pending', 'lapsed');
CREATE INDEX assignment_in_force ON assignment (item) WHERE state IN ('voted', 'skipped');
