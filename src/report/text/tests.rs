//! Whole texts, and that no file can make the page unfit to read.

use super::text;
use crate::adapter::Adapter;
use crate::report;
use safetensors::tensor::TensorView;
use safetensors::Dtype;
use serde_json::{json, Value};
use std::collections::HashMap;
use std::sync::Arc;

/// An adapter of zeros: keys, dtypes and shapes decide what a report says.
fn adapter(tensors: &[(&str, Dtype, &[usize])], metadata: &[(&str, &str)]) -> Arc<Adapter> {
    let zeros = vec![0u8; 1 << 16];
    let views = tensors.iter().map(|(name, dtype, shape)| {
        let bytes = crate::dtype::byte_len(*dtype, shape).unwrap();
        (*name, TensorView::new(*dtype, shape.to_vec(), &zeros[..bytes]).unwrap())
    });
    let metadata: HashMap<String, String> =
        metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Adapter::from_bytes(safetensors::serialize(views, Some(metadata)).unwrap()).unwrap()
}

const ADAPTER_ALONE: &str = r#"file       <memory>
content    2 modules, 7 keys, 1 unsupported, 1 malformed
algorithm  LoCon (1), LoRA (1)
rank       4 (1), 8 (1)
alpha      0 (1), none (1)
dtype      BF16+F16 (1), F16 (1)
spelling   kohya
size       7.0 KiB
family     SD 1.5 (768-wide cross attention)
title      inkstyle
about      Brush and ink. Use at 0.6 to 0.9; above that the paper's grain takes over and faces fall
           apart.
base       sd_v1, v1-5-pruned.safetensors, epsilon prediction
trigger    ink style
captions   ink style (20), a (12), b (11), c (10), d (9), e (8), f (7), g (6), h (5), i (4), 2 more
trained    sd-scripts 48d368f0aa11 (by ss_sd_scripts_commit_hash), 2024-05-17, 1 h 12 min
network    lycoris.kohya, dim 8, alpha 0, algo=locon, conv_dim=4
optimizer  AdamW8bit(weight_decay=0.1,betas=[.9,.99]), lr 0.0001, text encoder 5e-5, cosine
amount     1000 of 2000 steps, epoch 5 of 10, 200 images, batch 2, 512x512
options    fp16, seed 42
hash       d2f1c5a7
preview    8 B, image/jpeg
unreadable ss_bucket_info is not JSON: EOF while parsing an object at line 1 column 1
unsupported: 1 key
  emb_params: no suffix that this version knows
malformed: 1 key
  `lora_unet_mid_block_ff`: `lora_up.weight` is missing
"#;

const ADAPTER_ON_A_MODEL: &str = r#"file       /models/My LoRAs/a  b.safetensors
content    40 modules, 43 keys, 2 matched, 38 unmatched, 1 unsupported, 2 malformed
algorithm  LoRA
rank       1 to 10 (10 values, most often 10)
alpha      0.1 (30), none (10)
dtype      F16
spelling   kohya
size       40.0 MiB
unmatched: 38 keys
  lora_unet_extra_0_to_q (nearest: lora_unet_mid_to_q)
  lora_unet_extra_1_to_q (nearest: lora_unet_mid_to_q)
  lora_unet_extra_2_to_q (nearest: lora_unet_mid_to_q)
  lora_unet_extra_3_to_q (nearest: lora_unet_mid_to_q)
  lora_unet_extra_4_to_q (nearest: lora_unet_mid_to_q)
  lora_unet_extra_5_to_q (nearest: lora_unet_mid_to_q)
  lora_unet_extra_6_to_q (nearest: lora_unet_mid_to_q)
  lora_unet_extra_7_to_q (nearest: lora_unet_mid_to_q)
  lora_unet_extra_8_to_q (nearest: lora_unet_mid_to_q)
  lora_unet_extra_9_to_q (nearest: lora_unet_mid_to_q)
  and 3 more
unsupported: 1 key
  emb_params: no suffix that this version knows
malformed: 2 keys
  `lora_unet_wide`: the module does not fit the weight (module's shape first): [320, 768] and [640,
      2048] (target `mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight`)
notes: 3 modules
  m0 and 2 more: alpha is far from the rank: trained with another scale?
"#;

#[test]
fn an_adapter_by_itself() {
    use Dtype::{BF16, F16, F32};
    let adapter = adapter(
        &[
            ("lora_unet_mid_block_attn_to_q.alpha", F32, &[]),
            ("lora_unet_mid_block_attn_to_q.lora_down.weight", F16, &[8, 64]),
            ("lora_unet_mid_block_attn_to_q.lora_up.weight", F16, &[64, 8]),
            ("lora_unet_mid_block_conv.lora_down.weight", BF16, &[4, 64, 3, 3]),
            ("lora_unet_mid_block_conv.lora_up.weight", F16, &[64, 4, 1, 1]),
            ("lora_unet_mid_block_ff.lora_down.weight", F16, &[8, 64]),
            ("emb_params", F16, &[2, 2]),
        ],
        &[
            ("ss_output_name", "inkstyle"),
            ("modelspec.description", "Brush and ink.\nUse at 0.6 to 0.9; above that the paper's grain takes over and faces fall apart."),
            ("modelspec.prediction_type", "epsilon"),
            ("ss_base_model_version", "sd_v1"),
            ("ss_sd_model_name", "v1-5-pruned.safetensors"),
            ("ss_sd_scripts_commit_hash", "48d368f0aa11bb22cc33dd44ee55ff6677889900"),
            ("ss_network_module", "lycoris.kohya"),
            ("ss_network_dim", "8"),
            ("ss_network_alpha", "0.0"),
            ("ss_network_args", r#"{"algo": "locon", "conv_dim": "4"}"#),
            ("ss_optimizer", "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1,betas=[.9,.99])"),
            ("ss_learning_rate", "0.0001"),
            ("ss_text_encoder_lr", "5e-05"),
            ("ss_lr_scheduler", "cosine"),
            ("ss_lr_warmup_steps", "0"),
            ("ss_steps", "1000"),
            ("ss_max_train_steps", "2000"),
            ("ss_epoch", "5"),
            ("ss_num_epochs", "10"),
            ("ss_num_train_images", "200"),
            ("ss_num_reg_images", "0"),
            ("ss_total_batch_size", "2"),
            ("ss_resolution", "(512, 512)"),
            ("ss_mixed_precision", "fp16"),
            ("ss_seed", "42"),
            ("ss_training_started_at", "1715972580.75"),
            ("ss_training_finished_at", "1715976900.25"),
            ("ss_dataset_dirs", r#"{"10_ink style": {"n_repeats": 10, "img_count": 20}}"#),
            (
                "ss_tag_frequency",
                r#"{"10_ink style": {"ink style": 20, "a": 12, "b": 11, "c": 10, "d": 9, "e": 8, "f": 7, "g": 6, "h": 5,
                    "i": 4, "j": 3, "k": 2}}"#,
            ),
            ("ss_bucket_info", "{"),
            ("modelspec.thumbnail", "data:image/jpeg;base64,/9j/4AAQSkY="),
            ("sshs_model_hash", "d2f1c5a7"),
        ],
    );
    let mut report = report::json(&adapter, None);
    report["family"] = json!({"name": "SD 1.5", "reason": "768-wide cross attention"});
    assert_eq!(text(&report, false), ADAPTER_ALONE);
}

#[test]
fn an_adapter_on_a_model_and_a_merge() {
    let mut keys: Vec<Value> = Vec::new();
    for i in 0..12 {
        for slot in ["alpha", "lora_down.weight", "lora_up.weight"] {
            keys.push(json!({"key": format!("lora_unet_extra_{i}_to_q.{slot}"), "status": "unmatched", "nearest": "lora_unet_mid_to_q"}));
        }
    }
    for slot in ["lora_down.weight", "lora_up.weight"] {
        keys.push(json!({"key": format!("lora_te_other.{slot}"), "status": "unmatched"}));
        keys.push(json!({"key": format!("lora_unet_mid_to_q.{slot}"), "status": "matched"}));
        let why = "`lora_unet_wide`: the module does not fit the weight (module's shape first): [320, 768] and [640, 2048] \
            (target `mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight`)";
        keys.push(json!({"key": format!("lora_unet_wide.{slot}"), "status": "malformed", "reason": why}));
    }
    keys.push(
        json!({"key": "emb_params", "status": "unsupported", "reason": "no suffix that this version knows"}),
    );
    let modules: Vec<Value> = (0..40)
        .map(|i| {
            let mut module = json!({"module": format!("m{i}"), "spelling": "kohya", "algorithm": "LoRA", "rank": i % 10 + 1,
                "alpha": if i % 4 == 0 { json!(null) } else { json!(0.1f32) }, "dtype": "F16", "bytes": 1 << 20});
            if i < 3 {
                module["note"] = json!("alpha is far from the rank: trained with another scale?");
            }
            module
        })
        .collect();
    let report = json!({
        "file": "/models/My LoRAs/a  b.safetensors",
        "metadata": {},
        "facts": {},
        "summary": {"keys": 43, "modules": 40, "matched": 2, "unmatched": 38, "unsupported": 1, "malformed": 2},
        "modules": modules,
        "keys": keys,
    });
    assert_eq!(text(&report, false), ADAPTER_ON_A_MODEL);
    assert_eq!(text(&report, true).lines().count() - text(&report, false).lines().count(), 13 - 11);
    let merge = json!({
        "base": "base.safetensors", "output": "/out/merged model.safetensors", "device": "cpu", "bytes": 3_435_973_836u64,
        "tensors": {"changed": 2, "copied": 2}, "adapters": [report],
    });
    let merged = text(&merge, false);
    let lines: Vec<&str> = merged.lines().collect();
    let head = [
        "/out/merged model.safetensors: 2 tensors changed, 2 copied, 3.2 GiB",
        "  /models/My LoRAs/a  b.safetensors: 2 matched, 38 unmatched, 1 unsupported, 2 malformed of 43 keys",
        "    unmatched: 38 keys",
        "      lora_unet_extra_0_to_q (nearest: lora_unet_mid_to_q)",
    ];
    assert_eq!(lines[..4], head);
    assert_eq!(lines.len() - 2, ADAPTER_ON_A_MODEL.lines().count() - 8, "the same lists below it");
}

#[test]
fn no_file_spoils_the_page() {
    let hostile = "\u{1b}[2J\u{202e}evil\r\n\0 ".to_owned() + &"界".repeat(500) + &" x".repeat(500);
    let mut facts = json!({"unreadable": [{"key": hostile, "reason": hostile}], "trigger": {"phrases": [hostile],
        "tags": [{"tag": hostile, "count": 1}]}, "training": {"args": {}}});
    for name in ["title", "author", "description", "license", "usage_hint", "comment", "tags", "date"] {
        facts[name] = json!(hostile);
    }
    facts["training"]["args"][&hostile] = json!(hostile);
    let report = json!({"file": "a\u{1b}[31m\nb", "facts": facts, "keys": [], "modules": []});
    for all in [false, true] {
        let page = text(&report, all);
        for line in page.lines() {
            let columns: usize = line.chars().map(|c| if c == '界' { 2 } else { 1 }).sum();
            assert!(columns <= 100 && line.trim_end() == line, "{columns}: {line}");
        }
        assert!(page.chars().all(|c| c == '\n' || !c.is_control() && c != '\u{202e}'));
        assert!(page.contains("file       a\u{fffd}[31m b\n"), "{page}");
        // What is broken is broken between characters: with `all`, nothing is lost.
        assert!(!all || page.matches('界').count() % 500 == 0);
    }
    for odd in
        [json!(null), json!([]), json!("x"), json!({"adapters": 3}), json!({"modules": 1, "keys": {"a": 1}})]
    {
        assert_eq!(text(&odd, true), "content    0 modules, 0 keys\nsize       0 B\n", "{odd}");
    }
}
