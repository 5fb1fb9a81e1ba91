BEGIN TRANSACTION;
CREATE TABLE annotator (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    pseudonym TEXT NOT NULL UNIQUE,
    lead INTEGER NOT NULL DEFAULT 0,
    at TEXT NOT NULL
);
INSERT INTO "annotator" VALUES(1,'Ann','annotator-1',0,'2026-01-02T03:04:05.678+00:00');
INSERT INTO "annotator" VALUES(2,'Bob','annotator-2',0,'2026-01-02T03:04:05.678+00:00');
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
INSERT INTO "assignment" VALUES(1,1,'voted','t1','[1, 0]',1767323045.0,1767324845.0,2);
INSERT INTO "assignment" VALUES(1,2,'voted','t4','[0, 1]',1767323045.0,1767324845.0,8);
INSERT INTO "assignment" VALUES(2,1,'voted','t2','[0, 1]',1767323045.0,1767324845.0,4);
INSERT INTO "assignment" VALUES(2,2,'skipped','t5','[1, 0]',1767323045.0,1767324845.0,10);
INSERT INTO "assignment" VALUES(2,3,'pending','t6','[1, 0]',1767323045.0,1767324845.0,NULL);
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
INSERT INTO "event" VALUES(1,'2026-01-02T03:04:05.678+00:00',1,1,'shown','t1',NULL,'{"order": [1, 0]}');
INSERT INTO "event" VALUES(2,'2026-01-02T03:04:05.678+00:00',1,1,'vote','t1',NULL,'{"tiers": [[0], [1]], "strength": 2, "order": [1, 0], "seconds": 4.0}');
INSERT INTO "event" VALUES(3,'2026-01-02T03:04:05.678+00:00',2,1,'shown','t2',NULL,'{"order": [0, 1]}');
INSERT INTO "event" VALUES(4,'2026-01-02T03:04:05.678+00:00',2,1,'vote','t2',NULL,'{"tiers": [[1], [0]], "strength": 3, "order": [0, 1], "seconds": 4.0}');
INSERT INTO "event" VALUES(5,'2026-01-02T03:04:05.678+00:00',1,2,'shown','t3',NULL,'{"order": [0, 1]}');
INSERT INTO "event" VALUES(6,'2026-01-02T03:04:05.678+00:00',1,2,'vote','t3',NULL,'{"tiers": [[0, 1]], "strength": null, "order": [0, 1], "seconds": 4.0}');
INSERT INTO "event" VALUES(7,'2026-01-02T03:04:05.678+00:00',1,2,'undo','t4',6,'{}');
INSERT INTO "event" VALUES(8,'2026-01-02T03:04:05.678+00:00',1,2,'vote','t4',NULL,'{"tiers": [[1], [0]], "strength": 1, "order": [0, 1], "seconds": 4.0}');
INSERT INTO "event" VALUES(9,'2026-01-02T03:04:05.678+00:00',2,2,'shown','t5',NULL,'{"order": [1, 0]}');
INSERT INTO "event" VALUES(10,'2026-01-02T03:04:05.678+00:00',2,2,'skip','t5',NULL,'{"skipped": "unclear", "order": [1, 0], "seconds": 2.0}');
INSERT INTO "event" VALUES(11,'2026-01-02T03:04:05.678+00:00',2,3,'shown','t6',NULL,'{"order": [1, 0]}');
CREATE TABLE invitation (
    digest BLOB PRIMARY KEY,
    annotator INTEGER NOT NULL REFERENCES annotator (id),
    at REAL NOT NULL,
    until REAL NOT NULL
) WITHOUT ROWID;
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
INSERT INTO "item" VALUES(1,X'01010101010101010101010101010101',X'01010101010101010101010101010101','{"prompt": [{"role": "user", "content": "question 1"}], "responses": [[{"role": "assistant", "content": "answer 1.0"}], [{"role": "assistant", "content": "answer 1.1"}]]}',2,'[{"model": "a", "sampling": 1}, {"model": "b", "sampling": null}]',NULL,'old.jsonl',1,'2026-01-02T03:04:05.678+00:00');
INSERT INTO "item" VALUES(2,X'02020202020202020202020202020202',X'02020202020202020202020202020202','{"prompt": [{"role": "user", "content": "question 2"}], "responses": [[{"role": "assistant", "content": "answer 2.0"}], [{"role": "assistant", "content": "answer 2.1"}]]}',2,'[{"model": "a", "sampling": 1}, {"model": "b", "sampling": null}]',NULL,'old.jsonl',2,'2026-01-02T03:04:05.678+00:00');
INSERT INTO "item" VALUES(3,X'03030303030303030303030303030303',X'03030303030303030303030303030303','{"prompt": [{"role": "user", "content": "question 3"}], "responses": [[{"role": "assistant", "content": "answer 3.0"}], [{"role": "assistant", "content": "answer 3.1"}]]}',2,'[{"model": "a", "sampling": 1}, {"model": "b", "sampling": null}]',NULL,'old.jsonl',3,'2026-01-02T03:04:05.678+00:00');
INSERT INTO "item" VALUES(4,X'04040404040404040404040404040404',X'04040404040404040404040404040404','{"prompt": [{"role": "user", "content": "question 4"}], "responses": [[{"role": "assistant", "content": "answer 4.0"}], [{"role": "assistant", "content": "answer 4.1"}]]}',2,'[{"model": "a", "sampling": 1}, {"model": "b", "sampling": null}]','[[0], [1]]','old.jsonl',4,'2026-01-02T03:04:05.678+00:00');
CREATE TABLE sampling (id INTEGER PRIMARY KEY, settings TEXT NOT NULL UNIQUE);
INSERT INTO "sampling" VALUES(1,'{"temperature": 1.0}');
CREATE TABLE session (
    digest BLOB PRIMARY KEY,
    annotator INTEGER NOT NULL REFERENCES annotator (id),
    at REAL NOT NULL,
    until REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO "setting" VALUES('gold_every','10');
INSERT INTO "setting" VALUES('id','"0123456789abcdef"');
INSERT INTO "setting" VALUES('instructions','""');
INSERT INTO "setting" VALUES('lease','1800.0');
INSERT INTO "setting" VALUES('made_by','"prefopt 0.0.1"');
INSERT INTO "setting" VALUES('overlap','2');
INSERT INTO "setting" VALUES('seed','"s"');
INSERT INTO "setting" VALUES('tags','[]');
INSERT INTO "setting" VALUES('title','"An older study"');
CREATE INDEX item_gold ON item (id) WHERE gold IS NOT NULL;
CREATE UNIQUE INDEX event_once ON event (ticket) WHERE kind IN ('vote', 'skip');
CREATE UNIQUE INDEX event_undone_once ON event (undoes) WHERE undoes IS NOT NULL;
CREATE INDEX event_of ON event (annotator, id);
CREATE TRIGGER event_stays BEFORE UPDATE ON event BEGIN SELECT RAISE(ABORT, 'events are never changed'); END;
CREATE TRIGGER event_kept BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'events are never removed'); END;
CREATE INDEX assignment_waiting ON assignment (until) WHERE state = 'pending';
CREATE INDEX assignment_open ON assignment (annotator, since) WHERE state IN ('pending', 'lapsed');
CREATE INDEX assignment_in_force ON assignment (item) WHERE state IN ('voted', 'skipped');
COMMIT;
