-- Written by the code of revision 3737d24 (sqlite3's iterdump): a search of six trials and a hand-made study.
BEGIN TRANSACTION;
CREATE TABLE checkpoints (
	study INTEGER NOT NULL, 
	trials INTEGER NOT NULL, 
	body JSON NOT NULL, 
	tensors BLOB NOT NULL, 
	PRIMARY KEY (study), 
	FOREIGN KEY(study) REFERENCES studies (id)
);
INSERT INTO "checkpoints" VALUES(1,6,'{"rng": {"bit_generator": "PCG64", "state": {"state": 268102806044913727375722304477038943443, "inc": 87136372517582989555478159403783844777}, "has_uint32": 0, "uinteger": 0}, "seen": [[40, 78, 219, 218, 83], [46, 28, 131, 42, 41], [65, 35, 43, 270, 5], [81, 173, 219, 157, 24], [224, 144, 195, 201, 71], [269, 128, 78, 109, 234]]}',X'08000000000000007B7D202020202020');
INSERT INTO "checkpoints" VALUES(2,2,'{"a": 2}',X'79');
CREATE TABLE grainwise_schema (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "grainwise_schema" VALUES(1);
CREATE TABLE measurements (
	"key" VARCHAR(64) NOT NULL, 
	body JSON NOT NULL, 
	PRIMARY KEY ("key")
);
INSERT INTO "measurements" VALUES('218319dc503fe0d447c8f2cce061ea959818b94dc54a3b529c73f1afbb2b4c89','{"metric": 0.265625, "divergence": 0.020738039672208147, "size_bytes": 8573, "macs": 552064, "latency_ms": 0.0}');
INSERT INTO "measurements" VALUES('536a22b8af5fc949da99a3fd1d75bc71a8aac64ea99cb51aa9946eae41d7a63f','{"metric": 0.265625, "divergence": 0.03678876154620307, "size_bytes": 5180, "macs": 342784, "latency_ms": 0.0}');
INSERT INTO "measurements" VALUES('8316336bc20ef104590e7d01345e87188f1adff54e1506cd04af96507fa59541','{"metric": 0.265625, "divergence": 0.030839254912324983, "size_bytes": 6506, "macs": 227328, "latency_ms": 0.0}');
INSERT INTO "measurements" VALUES('61bbd9161c68a7cde1eeb4113ebb97ee3e24bd5d9130bdbdf00a311c80a72471','{"metric": 0.265625, "divergence": 0.03139017698801061, "size_bytes": 4366, "macs": 221212, "latency_ms": 0.0}');
INSERT INTO "measurements" VALUES('5150dbab072cdaa6e49d856fc1a9142d3be37329e7fd5b6af64d42a114d471e9','{"metric": 0.234375, "divergence": 0.034620976319334036, "size_bytes": 11306, "macs": 639488, "latency_ms": 0.0}');
INSERT INTO "measurements" VALUES('f9b2540153e19d24b4eca8d1c71a684ff227f487cf600ccca90e1c608a48124a','{"metric": 0.265625, "divergence": 0.03831157762041369, "size_bytes": 4206, "macs": 131712, "latency_ms": 0.0}');
INSERT INTO "measurements" VALUES('k','{"metric": 0.5, "divergence": 0.1, "size_bytes": 10, "macs": 20, "latency_ms": 0.0}');
CREATE TABLE studies (
	id INTEGER NOT NULL, 
	name VARCHAR(200) NOT NULL, 
	settings JSON NOT NULL, 
	created VARCHAR(40) NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (name)
);
INSERT INTO "studies" VALUES(1,'tiny','{"model": "71816b0d6ce09906ade5ca4468d0ddc832df1912eb6f05fdb276541d7c4d61d0", "target": "packed", "data": "c6e840fd31ddeff159485a6c9891c1402cc78fcf7febda21c437993e79ecda6f", "constraints": {"size": 0.3}, "options": {"searcher": "random", "algorithm": "ppo", "credit": "terminal", "projected": true, "prior": false, "reward": "hard_budget", "complexity_weight": 0.1, "space": "chain", "methods": ["none", "prune", "quantize", "factorize", "distill"], "seed": 0}, "budgets": {"size": 17750.399999999998}, "line": null, "aim": 0.97, "sensitivity": null}','2026-11-26T06:16:42+00:00');
INSERT INTO "studies" VALUES(2,'other','{"seed": 1}','2026-11-26T06:16:43+00:00');
CREATE TABLE trials (
	id INTEGER NOT NULL, 
	study INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	entries JSON NOT NULL, 
	outcome JSON NOT NULL, 
	reward FLOAT, 
	source VARCHAR(40) NOT NULL, 
	seconds FLOAT NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (study, number), 
	FOREIGN KEY(study) REFERENCES studies (id)
);
INSERT INTO "trials" VALUES(1,1,5,'{"stem": {"structure": {"method": "prune", "granularity": "layer", "level": 0.7}, "precision": {"method": "quantize", "granularity": "block", "level": 2}}, "block.0": {"structure": {"method": "prune", "granularity": "layer", "level": 0.3}, "precision": {"method": "quantize", "granularity": "channel", "level": 4}}, "block.3": {"structure": {"method": "factorize", "granularity": "layer", "level": 0.5}, "precision": {"method": "quantize", "granularity": "layer", "level": 8}}, "down": {"structure": {"method": "prune", "granularity": "layer", "level": 0.7}, "precision": {"method": "quantize", "granularity": "layer", "level": 4}}, "fc": {"structure": {"method": "prune", "granularity": "layer", "level": 0.7}, "precision": {"method": "quantize", "granularity": "layer", "level": 8}}}','{"metric": 0.265625, "divergence": 0.020738039672208147, "size_bytes": 8573, "macs": 552064, "latency_ms": 0.0, "prefix_rewards": []}',9.33348137565723878772e-01,'random',1.25045150899995860527e+00);
INSERT INTO "trials" VALUES(2,1,2,'{"stem": {"structure": {"method": "prune", "granularity": "layer", "level": 0.7}}, "block.0": {"structure": {"method": "prune", "granularity": "block", "level": 0.5}, "precision": {"method": "quantize", "granularity": "channel", "level": 4}}, "block.3": {"structure": {"method": "factorize", "granularity": "channel", "level": 0.125}, "precision": {"method": "quantize", "granularity": "channel", "level": 2}}, "down": {"structure": {"method": "factorize", "granularity": "channel", "level": 0.125}, "precision": {"method": "quantize", "granularity": "channel", "level": 4}}, "fc": {"structure": {"method": "prune", "granularity": "block", "level": 0.7}, "precision": {"method": "quantize", "granularity": "layer", "level": 2}}}','{"metric": 0.265625, "divergence": 0.03678876154620307, "size_bytes": 5180, "macs": 342784, "latency_ms": 0.0, "prefix_rewards": []}',9.08449975937278275672e-01,'random',0.00652150799987794);
INSERT INTO "trials" VALUES(3,1,1,'{"stem": {"structure": {"method": "distill", "granularity": "layer", "level": 0.5}, "precision": {"method": "quantize", "granularity": "block", "level": 8}}, "block.0": {"structure": {"method": "factorize", "granularity": "layer", "level": 0.25}, "precision": {"method": "quantize", "granularity": "block", "level": 8}}, "block.3": {"structure": {"method": "factorize", "granularity": "channel", "level": 0.5}, "precision": {"method": "quantize", "granularity": "block", "level": 4}}, "down": {"structure": {"method": "factorize", "granularity": "channel", "level": 0.25}, "precision": {"method": "quantize", "granularity": "layer", "level": 8}}, "fc": {"structure": {"method": "prune", "granularity": "block", "level": 0.5}, "precision": {"method": "quantize", "granularity": "layer", "level": 8}}}','{"metric": 0.265625, "divergence": 0.030839254912324983, "size_bytes": 6506, "macs": 227328, "latency_ms": 0.0, "prefix_rewards": []}',9.24547527570204641378e-01,'random',9.64291299987962702289e-03);
INSERT INTO "trials" VALUES(4,1,0,'{"stem": {"structure": {"method": "distill", "granularity": "channel", "level": 0.5}, "precision": {"method": "quantize", "granularity": "channel", "level": 2}}, "block.0": {"structure": {"method": "prune", "granularity": "channel", "level": 0.7}, "precision": {"method": "quantize", "granularity": "channel", "level": 4}}, "block.3": {"structure": {"method": "prune", "granularity": "block", "level": 0.5}, "precision": {"method": "quantize", "granularity": "channel", "level": 4}}, "down": {"structure": {"method": "prune", "granularity": "channel", "level": 0.3}, "precision": {"method": "quantize", "granularity": "channel", "level": 2}}, "fc": {"structure": {"method": "distill", "granularity": "layer", "level": 0.25}, "precision": {"method": "quantize", "granularity": "block", "level": 8}}}','{"metric": 0.265625, "divergence": 0.03139017698801061, "size_bytes": 4366, "macs": 221212, "latency_ms": 0.0, "prefix_rewards": []}',9.12653182779191829432e-01,'random',0.00883414800000537);
INSERT INTO "trials" VALUES(5,1,4,'{"stem": {"structure": {"method": "prune", "granularity": "block", "level": 0.3}, "precision": {"method": "quantize", "granularity": "block", "level": 4}}, "block.0": {"structure": {"method": "prune", "granularity": "layer", "level": 0.5}, "precision": {"method": "quantize", "granularity": "block", "level": 4}}, "block.3": {"structure": {"method": "prune", "granularity": "layer", "level": 0.7}, "precision": {"method": "quantize", "granularity": "layer", "level": 2}}, "down": {"structure": {"method": "distill", "granularity": "channel", "level": 0.25}}, "fc": {"precision": {"method": "quantize", "granularity": "block", "level": 4}}}','{"metric": 0.234375, "divergence": 0.034620976319334036, "size_bytes": 11306, "macs": 639488, "latency_ms": 0.0, "prefix_rewards": []}',9.20447807038068388507e-01,'random',3.56678800017107278108e-03);
INSERT INTO "trials" VALUES(6,1,3,'{"stem": {"structure": {"method": "prune", "granularity": "block", "level": 0.7}, "precision": {"method": "quantize", "granularity": "layer", "level": 8}}, "block.0": {"structure": {"method": "factorize", "granularity": "block", "level": 0.25}, "precision": {"method": "quantize", "granularity": "layer", "level": 2}}, "block.3": {"structure": {"method": "factorize", "granularity": "channel", "level": 0.125}, "precision": {"method": "quantize", "granularity": "channel", "level": 2}}, "down": {"structure": {"method": "factorize", "granularity": "layer", "level": 0.125}, "precision": {"method": "quantize", "granularity": "channel", "level": 8}}, "fc": {"structure": {"method": "prune", "granularity": "layer", "level": 0.3}, "precision": {"method": "quantize", "granularity": "block", "level": 8}}}','{"metric": 0.265625, "divergence": 0.03831157762041369, "size_bytes": 4206, "macs": 131712, "latency_ms": 0.0, "prefix_rewards": []}',9.27176552986046620397e-01,'random',3.42546799993215245194e-03);
INSERT INTO "trials" VALUES(7,2,0,'{"a": {"structure": {"method": "prune", "granularity": "block", "level": 0.1}, "precision": {"method": "quantize", "granularity": "layer", "level": 2}}}','{"metric": 0.5, "divergence": 0.1, "size_bytes": 10, "macs": 20, "latency_ms": 0.0, "prefix_rewards": [0.2, 0.9]}',0.9,'controller',0.25);
INSERT INTO "trials" VALUES(8,2,1,'{"a": {"structure": {"method": "prune", "granularity": "block", "level": 0.1}, "precision": {"method": "quantize", "granularity": "layer", "level": 2}}}','{"failed": "build", "reason": "why"}',NULL,'controller',0.5);
CREATE INDEX ix_trials_study ON trials (study);
COMMIT;
